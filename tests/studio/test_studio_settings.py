"""The studio's settings: base, what it predicts, device, CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from studios import work

from app.actions.studio import Studio, open_studio
from app.actions.trainings import base_facts, look_at_base, unknown_base
from app.actions.workbench import chosen_base
from app.jobs import State
from spectral_diffusion.errors import InputError


def test_settings_are_kept_and_checked(studio: Studio, tmp_path: Path, tiny_base_folder: Path) -> None:
    studio.change_settings(base=f" {tiny_base_folder} ", device="cpu")
    assert open_studio(studio.root).settings.base == str(tiny_base_folder)
    for changes, sentence in (
        ({"base": str(tmp_path / "nothing")}, "There is no base"),
        ({"base": str(tmp_path)}, "is not a diffusers folder"),
        ({"device": "abacus"}, "There is no device 'abacus'"),
        ({"clip": "nothing"}, "There is no CLIP"),
    ):
        with pytest.raises(InputError, match=sentence):
            studio.change_settings(**changes)
    assert studio.settings.base == str(tiny_base_folder)
    assert studio.change_settings(base="", device="").base is None
    assert json.loads((studio.root / "settings.json").read_text())["base"] is None


@pytest.mark.parametrize("text", ['{"base": nul', '{"colour": 1}', "[]", "\xff"])
def test_settings_that_cannot_be_read_are_named(studio: Studio, text: str) -> None:
    (studio.root / "settings.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"settings\.json' does not hold the studio's settings .*; correct it, or remove it"):
        open_studio(studio.root)


def test_a_base_that_is_chosen_while_another_is_looked_at_is_looked_at_too(tiny_studio: Studio, tmp_path: Path) -> None:
    chosen = tiny_studio.settings.base
    tiny_studio.change_settings(base="")
    assert look_at_base(tiny_studio) is not None and look_at_base(tiny_studio) is None
    tiny_studio.change_settings(base=chosen)
    assert look_at_base(tiny_studio) is not None
    assert work(tiny_studio) == [State.DONE, State.DONE]
    assert base_facts(tiny_studio)["chosen"][0] == chosen  # the one before was not looked at for nothing


def test_of_a_base_that_cannot_be_used_it_is_said_why(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "base.safetensors").write_text("hello")
    studio.change_settings(base=str(tmp_path / "base.safetensors"))
    look_at_base(studio)
    assert "is being looked at" in unknown_base(studio)
    assert work(studio) == [State.FAILED] and "is no checkpoint" in unknown_base(studio)
    studio.jobs.cancel(look_at_base(studio))
    assert "begins again" in unknown_base(studio)


def test_what_a_base_predicts_is_read_from_its_files_or_said(tiny_studio: Studio) -> None:
    older = {"base": tiny_studio.settings.base, "device": "cpu", "clip": None}  # as the jobs of a time without it have them
    assert chosen_base(older).pipeline.scheduler.config.prediction_type == "epsilon"
    look_at_base(tiny_studio)
    assert work(tiny_studio) == [State.DONE] and base_facts(tiny_studio)["predicts"] == "epsilon"
    tiny_studio.change_settings(prediction_type="v_prediction")
    assert base_facts(tiny_studio) is None and look_at_base(tiny_studio) is not None
    work(tiny_studio)
    assert base_facts(tiny_studio)["predicts"] == "v_prediction"
    with pytest.raises(InputError, match="embedded base says itself what it predicts"):
        tiny_studio.change_settings(base="")
    assert tiny_studio.change_settings(base="", prediction_type="").loading == [None, "cpu", None]
