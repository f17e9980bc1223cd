"""Parts of the page that follow the studio: looked at once a second, sent only when they changed."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import gradio as gr

from app.ui import markup
from spectral_diffusion.errors import SpectralDiffusionError

logger = logging.getLogger(__name__)

EVENT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
"""How events run; nearly all are quick."""
PIECE: dict[str, Any] = EVENT | {"trigger_mode": "multiple", "concurrency_limit": 1}
"""How events of our own HTML run, in which many things report as one: in order, and none dropped while another is under way."""
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
    send: Callable[[Any, Any], Any] | None = None  # makes the answer of what was rendered and what the page has


class Live:
    """Collects the parts of a page and keeps them fresh."""

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self._firsts: dict[Any, Callable[[], Any]] = {}

    def add(self, component: Any, render: Callable[..., Any], *inputs: Any) -> Any:
        """Let `component` show what `render` returns for the values of `inputs`; return the component."""
        self._parts.append(_Part(component=component, render=render, inputs=inputs))
        return component

    def offer(self, picks: gr.CheckboxGroup, pairs: Callable[[], Sequence[tuple[str, str]]]) -> gr.CheckboxGroup:
        """Let `picks` offer what `pairs` returns (label and value), hidden while there is nothing; return the component.

        What was chosen and is gone is chosen no more: gradio refuses every event that comes with such a value.
        """

        def send(offered: Sequence[tuple[str, str]], chosen: list[str]) -> Any:
            values = [value for _, value in offered]
            kept = [value for value in chosen if value in values]
            return gr.update(choices=list(offered), value=kept, visible=bool(offered))

        self._parts.append(_Part(component=picks, render=lambda _: pairs(), inputs=(picks,), send=send))
        return picks

    def begin(self, component: Any, value: Callable[[], Any]) -> Any:
        """Let `component` have the `value` of that moment when the page opens; return the component."""
        self._firsts[component] = value
        return component

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
                value = _rendered(part, at_hand)
                digest = hashlib.sha256(repr(value).encode()).hexdigest()
                if value is None or known.get(number) == digest:
                    results.append(gr.skip())
                    continue
                results.append(part.send(value, at_hand[part.component]) if part.send else value)
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


def _rendered(part: _Part, at_hand: dict[Any, Any]) -> Any:
    """Return what `part` shows; one that fails says so in its place where it can, else it stays as it is (None)."""
    try:
        return part.render(*(at_hand[control] for control in part.inputs))
    except Exception as error:  # a file put there by hand may be wrong in any way
        words = str(error)
        if not isinstance(error, SpectralDiffusionError):
            _log(traceback.format_exc())
            words = f"This part cannot be shown ({type(error).__name__}: {error}); the terminal says where that comes from."
        return markup.refusal(words) if isinstance(part.component, gr.HTML) else None


@lru_cache(maxsize=256)
def _log(trace: str) -> None:
    """Log where a failure comes from, once and not in every second."""
    logger.error("A part of the page could not be shown.\n%s", trace)


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


def choices(pairs: Sequence[tuple[str, str]], *, value: str | None) -> Any:
    """Return a list's new choices (label and value), keeping `value` when it is among them."""
    values = [choice for _, choice in pairs]
    return gr.update(choices=list(pairs), value=value if value in values else next(iter(values), None), visible=bool(values))
