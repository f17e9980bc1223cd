"""The studio's base: one at a time."""

from __future__ import annotations

import weakref

import pytest

from app.actions import workbench


class Loaded:
    """Stands for a base."""


def test_a_base_is_let_go_before_another_one_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[weakref.ref[Loaded]] = []

    def load(source: str, device: str) -> Loaded:
        assert not any(other() for other in before)
        loaded = Loaded()
        before.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(workbench, "_loaded", {})
    monkeypatch.setattr(workbench, "load_base", load)
    for source in ("a", "a", "b"):
        workbench.chosen_base({"base": source, "device": "cpu"})
    assert len(before) == 2
