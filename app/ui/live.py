"""Parts of the page that follow the studio: looked at once a second, sent only when they changed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.ui import markup
from spectral_diffusion.errors import SpectralDiffusionError

EVENT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
"""How events run; nearly all are quick."""
SLOW: dict[str, Any] = EVENT | {"show_progress": "full"}
"""How events run that read photos."""
MOST_PAGES = 100
"""Pages that may be open at once; each keeps one event under way."""
_SIGN_OF_LIFE = 15.0  # seconds between two empty answers, after which a page that was closed is noticed


@dataclass(frozen=True, kw_only=True)
class _Part:
    component: Any
    render: Callable[..., Any]
    inputs: tuple[Any, ...]


class Live:
    """Collects the parts of a page and keeps them fresh."""

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self._firsts: dict[Any, Callable[[], Any]] = {}

    def add(self, component: Any, render: Callable[..., Any], *inputs: Any) -> Any:
        """Let `component` show what `render` returns for the values of `inputs`; return the component."""
        self._parts.append(_Part(component=component, render=render, inputs=inputs))
        return component

    def begin(self, component: Any, value: Callable[[], Any]) -> Any:
        """Let `component` have the `value` of that moment when the page opens; return the component."""
        self._firsts[component] = value
        return component

    def folded(self, label: str, **named: Any) -> gr.Accordion:
        """Return an accordion that is closed when the page has opened, with everything in it in place.

        What lies in an accordion that begins closed is put on the page when it opens, and what is typed meanwhile is lost.
        """
        return self.begin(gr.Accordion(label, **named), lambda: gr.update(open=False))

    def wire(self, page: gr.Blocks, seconds: float = 1.0) -> None:
        """Refresh all parts when the page opens and every `seconds`.

        The event of the opening page never ends: gradio's client gives the whole connection up when the answer to one event
        closes the page's stream of answers while another event is being sent, and an event under way keeps the stream open.
        """
        seen, timer = gr.State({}), gr.Timer(seconds, active=False)
        inputs = list(dict.fromkeys(control for part in self._parts for control in part.inputs))
        outputs = [seen, *(part.component for part in self._parts)]

        def refresh(known: dict[int, str], *values: Any) -> list[Any]:
            at_hand = dict(zip(inputs, values, strict=True))
            known, results = dict(known), []
            for number, part in enumerate(self._parts):
                value = part.render(*(at_hand[control] for control in part.inputs))
                digest = hashlib.sha256(repr(value).encode()).hexdigest()
                results.append(gr.skip() if known.get(number) == digest else value)
                known[number] = digest
            return [known, *results]

        async def stay_open(*values: Any) -> AsyncIterator[list[Any]]:
            firsts = {component: value() for component, value in self._firsts.items()}
            at_hand = dict(zip(inputs, values, strict=True)) | firsts
            fresh = await asyncio.to_thread(refresh, {}, *(at_hand[control] for control in inputs))
            yield [gr.Timer(active=True), *firsts.values(), *fresh]
            while True:
                await asyncio.sleep(_SIGN_OF_LIFE)
                yield [gr.skip()] * (1 + len(firsts) + len(outputs))

        page.load(stay_open, inputs, [timer, *self._firsts, *outputs], **EVENT)
        timer.tick(refresh, [seen, *inputs], outputs, trigger_mode="once", **EVENT)


def attempt(action: Callable[..., Any], *arguments: Any, done: str | None = None, **named: Any) -> Any:
    """Return what `action` returns, or None when it refused; the page then shows its sentence."""
    try:
        result = action(*arguments, **named)
    except SpectralDiffusionError as error:
        gr.Warning(markup.text(error), title="Not done")  # it is shown as HTML
        return None
    if done is not None:
        gr.Info(markup.text(done), duration=4, title="Done")
    return result


def said(event: gr.EventData) -> tuple[str, str, str]:
    """Return what a button or field of our own HTML reported: what to do, with what, and the field's value."""
    data = event._data if isinstance(event._data, dict) else {}
    return tuple(str(data.get(key) or "") for key in ("do", "name", "value"))


def several(pairs: Sequence[tuple[str, str]]) -> Any:
    """Return the new choices of a list of which several may be chosen; it is hidden while there are none."""
    return gr.update(choices=list(pairs), visible=bool(pairs))


def choices(pairs: Sequence[tuple[str, str]], *, value: str | None) -> Any:
    """Return a list's new choices (label and value), keeping `value` when it is among them."""
    values = [choice for _, choice in pairs]
    return gr.update(choices=list(pairs), value=value if value in values else next(iter(values), None), visible=bool(values))
