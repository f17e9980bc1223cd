"""Work that takes a while and has no pictures or losses to show: counted where it is done, told to whoever listens.

What a training prepares lies many calls deep, and differs by its settings. So a listener is set around a whole command or job,
as a handler is for what is logged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Listener = Callable[[str, str, int, int], None]
"""Hears what is being done, the unit that it is counted in, how many are done, and of how many."""

_Item = TypeVar("_Item")
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """While entered, `listener` hears of every stage of this thread's work; what it raises ends that work."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def counted(what: str, unit: str, items: Collection[_Item]) -> Iterator[_Item]:
    """Yield `items`, and tell the listener at the start and whenever one of them is done."""
    tell = _listener.get() or (lambda *stage: None)
    tell(what, unit, 0, len(items))
    for done, item in enumerate(items, start=1):
        yield item
        tell(what, unit, done, len(items))
