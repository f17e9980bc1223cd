"""Work that takes a while is counted for whoever listens."""

from __future__ import annotations

import re
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from short_trainings import BAND, SHORT, assert_bit_equal

from spectral_diffusion.bases.base import Base, load_base
from spectral_diffusion.cli import displays
from spectral_diffusion.concepts.concept import SAMPLES_FOLDER, Concept, load_concept
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.stages import counted, listening
from spectral_diffusion.training import TrainingProgress, train


def test_a_listener_hears_of_the_start_and_of_every_item() -> None:
    heard: list[tuple[str, str, int, int]] = []
    with listening(lambda *stage: heard.append(stage)):
        assert list(counted("spectrum", "layer", "ab")) == ["a", "b"]
    assert heard == [("spectrum", "layer", done, 2) for done in range(3)]
    assert list(counted("spectrum", "layer", "ab")) == ["a", "b"] and len(heard) == 3


def test_what_a_listener_raises_ends_the_work_and_the_listening() -> None:
    def refuse(what: str, unit: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), listening(refuse):
        next(counted("spectrum", "layer", "ab"))
    assert next(counted("spectrum", "layer", "ab")) == "a"


def test_a_training_tells_all_that_it_prepares(
    base: Base, less_preparation: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path))
    ended: dict[str, bool] = {}
    settings = replace(SHORT, steps=1, scenes=0.5)
    with listening(lambda what, unit, done, total: ended.update({what: done == total})):
        train(base, load_concept(SAMPLES_FOLDER / "poodle"), Band(start=0, rank=settings.rank), settings)
    assert ended == dict.fromkeys(
        ("photos", "scenes", "spectrum", "reference pictures", "reference predictions", "activations"), True
    )


def test_loading_a_base_tells_how_far_it_is() -> None:
    ended: dict[str, bool] = {}
    with listening(lambda what, unit, done, total: ended.update({f"{what}, {unit}": done == total})):
        load_base()
    assert ended == {"reading the base, layer": True, "loading the base, tensor": True}


def test_what_is_stopped_after_the_last_step_loses_none(
    base: Base, concept: Concept, less_preparation: None, tmp_path: Path
) -> None:
    def stop(what: str, unit: str, done: int, total: int) -> None:
        if what == "activations":
            raise KeyboardInterrupt

    events: list[TrainingProgress] = []
    with pytest.raises(KeyboardInterrupt), listening(stop):
        train(base, concept, BAND, SHORT, checkpoint=tmp_path / "state")
    result = train(base, concept, BAND, SHORT, checkpoint=tmp_path / "state", on_progress=events.append)
    assert result.finished and not events
    assert_bit_equal(result.adapter, train(base, concept, BAND, SHORT).adapter)


def test_the_command_line_shows_what_takes_long_with_its_remaining_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(displays, "_PATIENCE", 0.05)
    with closing(displays.StageDisplay()) as display, listening(display.show):
        for _ in counted("photos", "crop", "ab"):
            pass
        assert not capsys.readouterr().err
        for _ in counted("scenes", "batch", "abcd"):
            time.sleep(0.04)
    shown = capsys.readouterr().err
    assert "scenes:  50%" in shown and "photos" not in shown
    assert re.search(r"2/4 \[00:00<00:00, +[\d.]+batch/s\]", shown) and shown.rstrip(" ").endswith("\r")


def test_short_stages_that_follow_each_other_are_one_wait(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(displays, "_PATIENCE", 0.1)
    with closing(displays.StageDisplay()) as display, listening(display.show):
        for what in ("starting", "loading"):
            for _ in counted(what, "part", "abc"):
                time.sleep(0.03)
        assert re.search(r"loading:  \d\d%", capsys.readouterr().err)
        time.sleep(0.2)  # a training, whose own bar stood here
        for _ in counted("spectrum", "part", "abc"):
            time.sleep(0.001)
    assert "spectrum" not in capsys.readouterr().err
