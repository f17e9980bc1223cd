"""The studio's base: one at a time, and on a GPU in half precision, which no file shall be made of."""

from __future__ import annotations

import weakref
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from random_adapters import random_adapter
from safetensors.torch import load_file
from studios import work

from app.actions import workbench
from app.actions.adapters import export
from app.actions.studio import Studio
from app.jobs import State
from spectral_diffusion.adapters.adapter_file import save_adapter
from spectral_diffusion.bases.base import Base, load_base


class Loaded:
    """Stands for a base."""


def test_a_base_is_let_go_before_another_one_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[weakref.ref[Loaded]] = []

    def load(source: str, **how: object) -> Loaded:
        assert not any(other() for other in before)
        loaded = Loaded()
        before.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(workbench, "_loaded", {})
    monkeypatch.setattr(workbench, "load_base", load)
    for source in ("a", "a", "b"):
        workbench.chosen_base({"base": source, "device": "cpu"})
    assert len(before) == 2


def test_a_checkpoint_is_made_of_the_weights_as_their_files_hold_them(
    tiny_studio: Studio, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workbench, "_loaded", {})
    monkeypatch.setattr(workbench, "load_base", partial(load_base, precision=torch.float16))  # as on a GPU
    tiny_studio.change_settings(prediction_type="v_prediction")  # which its files do not say
    adapter = replace(random_adapter(base), prediction_type="v_prediction")
    save_adapter(adapter, tiny_studio.folder("adapters") / "one.safetensors")
    export(tiny_studio, "adapters/one.safetensors", "fp32", format="checkpoint")
    assert work(tiny_studio)[-1] is State.DONE
    with zipfile.ZipFile(tiny_studio.file("exports", tiny_studio.jobs.jobs()[0].result["file"])) as archive:
        archive.extractall(tmp_path)
    merged = load_file(tmp_path / "one" / "unet" / "diffusion_pytorch_model.safetensors")
    untouched = merged.keys() - {f"{key.removeprefix('unet.')}.weight" for key in adapter.layer_keys()}
    own = base.pipeline.unet.state_dict()
    assert untouched and all(torch.equal(merged[name], own[name]) for name in untouched)
