"""The tab Settings: base, device, CLIP, folders, memory."""

from __future__ import annotations

import gradio as gr
import psutil

from app.actions.studio import Studio, devices
from app.actions.trainings import base_facts, look_at_base
from app.ui import markup
from app.ui.live import EVENT, Live, attempt


def build_settings(studio: Studio, live: Live) -> None:
    """Build the tab."""
    now = studio.settings
    base = gr.Textbox(
        lambda: studio.settings.base or "", label="Base", placeholder="the embedded toy world", elem_id="base",
        info="A diffusers folder or checkpoint file on this computer, or a hub id, of the Stable Diffusion family. "
        "Empty: the embedded base.",
    )  # fmt: skip
    device = gr.Dropdown(
        [("the best there is", ""), *((name, name) for name in devices())], value=now.device or "", label="Device"
    )
    clip = gr.Textbox(
        lambda: studio.settings.clip or "", label="CLIP for the scores", placeholder="the embedded one (toy world only)",
        info="A folder in open_clip’s form, or NAME:WEIGHTS such as ViT-B-32:weights.safetensors.",
    )  # fmt: skip
    keep = gr.Button("Keep", variant="primary", elem_id="keep-settings")
    live.add(gr.HTML(elem_id="facts"), lambda: _facts(studio))

    def change(new_base: str, new_device: str, new_clip: str) -> None:
        changed = attempt(studio.change_settings, base=new_base, device=new_device or "", clip=new_clip, done="Kept.")
        if changed is not None:
            look_at_base(studio)

    keep.click(change, [base, device, clip], **EVENT)


def _facts(studio: Studio) -> str:
    facts = base_facts(studio)
    if facts is None:
        failed = next((job for job in studio.jobs.jobs() if job.kind == "look"), None)
        words = failed.reason if failed is not None and failed.reason else "The base is being looked at …"
        base = [["the base", words]]
    else:
        base = [
            ["the base", f"family {facts['family']}, pictures of {facts['resolution']} pixels, on {facts['device']}"],
            ["room", f"{facts['directions'] // 8} concepts of rank 8 ({facts['directions']} directions)"],
        ]
    memory = psutil.virtual_memory()
    rows = [*base, ["folder", str(studio.root)], ["memory", f"{memory.percent:.0f} % of {memory.total / 1e9:.0f} GB in use"]]
    return markup.table(["what", "now"], rows)
