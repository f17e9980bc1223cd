"""The page: its tabs, its theme, its title."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from app.actions.studio import Studio
from app.ui import markup
from app.ui.activity import build_activity, build_jobs
from app.ui.compare import build_compare
from app.ui.concepts import build_concepts
from app.ui.export import build_export
from app.ui.fuse import build_fuse
from app.ui.generate import build_generate
from app.ui.live import Live
from app.ui.settings import build_settings

TITLE = "Spectral Diffusion studio"
STYLE = Path(__file__).with_name("style.css")
TABS = {
    "Concepts": build_concepts,
    "Fuse": build_fuse,
    "Generate": build_generate,
    "Compare": build_compare,
    "Export": build_export,
    "Settings": build_settings,
}
"""Name of each tab to what builds it."""


def theme() -> gr.themes.Base:
    """Return the page's theme: the fonts of the system, so that nothing is fetched."""
    return gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )


def build_page(studio: Studio) -> gr.Blocks:
    """Build the page of a studio."""
    live = Live()
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        live.add(gr.HTML(elem_id="title"), lambda: _head(studio))
        build_activity(studio, live)
        with gr.Tabs():
            for name, build in TABS.items():
                # with its children in place, as those of `folded` are: else what is typed while they come is lost
                with gr.Tab(name, id=name.lower(), elem_id=f"tab-{name.lower()}", render_children=True):
                    build(studio, live)
        build_jobs(studio, live)
        live.wire(page)
    return page


def _head(studio: Studio) -> str:
    base = studio.settings.base or "embedded toy world"
    return (
        '<header class="sd-head"><h1>Spectral Diffusion</h1><p>Your photos in, one file with all of them out.</p>'
        f'<span class="sd-base sd-muted">base: {markup.text(base)}</span></header>'
    )
