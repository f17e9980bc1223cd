"""Parts of the page that stay folded until somebody opens them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from app.ui import markup

_FOLDS = """
element.addEventListener('click', (event) => {
  const head = event.target.closest('.sd-fold-head');
  if (head) head.setAttribute('aria-expanded', head.getAttribute('aria-expanded') !== 'true');
});
"""


@contextmanager
def folded(label: str, *, elem_id: str | None = None) -> Iterator[None]:
    """Put what is built meanwhile under a heading that opens and closes it; it is closed at first.

    All of it is in place from the beginning. What lies in a gradio accordion is put on the page when that opens, and what is
    typed until then is lost.
    """
    with gr.Column(elem_id=elem_id, elem_classes="sd-fold"):
        gr.HTML(
            f'<button type="button" class="sd-fold-head" aria-expanded="false">{markup.text(label)}</button>', js_on_load=_FOLDS
        )
        with gr.Column(elem_classes="sd-folded"):
            yield
