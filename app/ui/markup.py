"""Pieces of HTML for the page. Everything that is not written here is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

from app.jobs import Job, State

CLICKS = """
const send = (event, source) => {
  const found = event.target.closest('[data-do]');
  if (!found || !element.contains(found) || found.disabled) return;
  if ((found.tagName === 'INPUT') !== (source === 'change')) return;
  if (found.dataset.confirm && !window.confirm(found.dataset.confirm)) return;
  trigger('click', {do: found.dataset.do, name: found.dataset.name, value: found.value});
};
element.addEventListener('click', (event) => send(event, 'click'));
element.addEventListener('change', (event) => send(event, 'change'));
"""
"""JavaScript of a piece with buttons and fields: one that has `data-do` reports it, with `data-name`, as a click."""

SLIDES = """
const both = (event) => [...event.target.closest('.sd-slider').querySelectorAll('input')];
element.addEventListener('input', (event) => {
  if (event.target.value !== '') for (const field of both(event)) if (field !== event.target) field.value = event.target.value;
});
element.addEventListener('change', (event) => {
  const {value, defaultValue, min, max} = event.target;
  const kept = value === '' ? defaultValue : Math.min(Math.max(value, min), max);
  for (const field of both(event)) field.value = kept;
});
"""
"""JavaScript of a piece with sliders, to go before `CLICKS`: number and knob follow each other and stay in their bounds."""


def text(value: object) -> str:
    """Return `value` as text that HTML takes for nothing else, also between quotation marks."""
    return html.escape(str(value), quote=True).replace("$", "&#36;").replace("{", "&#123;")


def file_url(path: Path) -> str:
    """Return the address under which the page gets a file of the studio; it changes when the file does."""
    return f"gradio_api/file={quote(str(path))}?v={path.stat().st_mtime_ns if path.exists() else 0}"


def webp_address(content: bytes) -> str:
    """Return an address that holds a WebP picture itself."""
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"


def button(do: str, name: str, label: str, *, kind: str = "", confirm: str = "", title: str = "") -> str:
    """Return a button that reports `do` and `name`."""
    more = f' data-confirm="{text(confirm)}"' if confirm else ""
    more += f' aria-label="{text(title)}" title="{text(title)}"' if title else ""
    what = f'data-do="{text(do)}" data-name="{text(name)}"'
    return f'<button type="button" class="sd-button {kind}" {what}{more}>{text(label)}</button>'


def slider(do: str, name: str, label: str, value: float, most: float) -> str:
    """Return a slider from 0 to `most` with a field for its number; either reports `do`, `name` and the value."""
    what = f'data-do="{text(do)}" data-name="{text(name)}" min="0" max="{most:g}" step="0.05" value="{value:g}"'
    field = f'<input type="number" class="sd-field" aria-label="number input for {text(label)}" {what}>'
    knob = f'<input type="range" aria-label="{text(label)}" {what}>'
    return f'<div class="sd-slider"><span>{text(label)}</span>{field}{knob}</div>'


def image(path: Path, alternative: str, *, kind: str = "") -> str:
    """Return a picture of the studio."""
    return f'<img class="{kind}" src="{text(file_url(path))}" alt="{text(alternative)}" loading="lazy">'


def link(path: Path, label: str, *, download: bool = False) -> str:
    """Return a link that opens or downloads a file of the studio."""
    how = f'download="{text(path.name)}"' if download else 'target="_blank" rel="noopener"'
    return f'<a class="sd-button" href="{text(file_url(path))}" {how}>{text(label)}</a>'


def frame(path: Path, title: str) -> str:
    """Return a page of the studio within the page, where its style and ours do not meet; scripts in it do not run."""
    return f'<iframe class="sd-frame" sandbox srcdoc="{_page(path, path.stat().st_mtime_ns)}" title="{text(title)}"></iframe>'


@lru_cache(maxsize=4)
def _page(path: Path, changed: int) -> str:
    """Return the page at `path` as text of an attribute; it holds pictures, and is asked for once a second."""
    return text(path.read_text(encoding="utf-8"))


def muted(words: str) -> str:
    """Return a faint line."""
    return f'<p class="sd-muted">{text(words)}</p>'


def heading(words: str) -> str:
    """Return the heading of a section."""
    return f'<h3 class="sd-section">{text(words)}</h3>'


def refusal(words: str) -> str:
    """Return why something did not work."""
    return f'<p class="sd-reason">{text(words)}</p>'


def badge(label: str, kind: str = "") -> str:
    """Return a small label."""
    return f'<span class="sd-badge {kind}">{text(label)}</span>'


def state_badge(state: State) -> str:
    """Return a label for the state of a job."""
    return badge(state.value, f"sd-{state.value}")


def bar(done: float, total: float, label: str) -> str:
    """Return a progress bar."""
    share = 100 * min(1.0, done / total) if total else 0.0
    return (
        f'<div class="sd-bar" role="progressbar" aria-label="{text(label)}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{share:.0f}"><div style="width:{share:.1f}%"></div></div>'
    )


def empty(words: str) -> str:
    """Return what stands where nothing is yet: what to do."""
    return f'<p class="sd-empty">{text(words)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], ends: Iterable[str] = ()) -> str:
    """Return a table of texts, the first of each row being its heading; `ends` are pieces of HTML, one for each row's end."""
    top = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    lines = [f'<th scope="row">{text(row[0])}</th>{"".join(f"<td>{text(cell)}</td>" for cell in row[1:])}' for row in rows]
    for number, end in enumerate(ends):
        lines[number] += f"<td>{end}</td>"
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="sd-scroll"><table class="sd-table"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def duration(seconds: float | None) -> str:
    """Return a time in words: `40 s`, `12 min`, `1 h 20 min`."""
    if seconds is None:
        return "not measured yet"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def job_buttons(job: Job, waiting: Sequence[str]) -> str:
    """Return what can be done with a job."""
    if job.state is State.RUNNING:
        return badge("stopping …") if job.stopping else button("cancel", job.name, "Stop")
    if job.state is State.QUEUED:
        first = waiting[:1] == [job.name]
        up = "" if first else button("up", job.name, "↑", title=f"Move {job.title} up")
        return up + button("cancel", job.name, "Cancel")
    if job.state in (State.CANCELLED, State.INTERRUPTED):
        return button("resume", job.name, "Resume", kind="sd-primary")
    return button("resume", job.name, "Try again") if job.state is State.FAILED else ""
