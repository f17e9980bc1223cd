"""Exports of the studio: each concept as strong as was asked for."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from random_adapters import random_adapter
from studios import work

from app.actions.adapters import export
from app.actions.studio import Studio
from app.jobs import State
from spectral_diffusion.adapters.adapter_file import load_adapter, save_adapter
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base
from spectral_diffusion.errors import AdapterError
from spectral_diffusion.imports import import_lora


def test_a_concept_is_exported_as_strong_as_was_asked_for(tiny_studio: Studio, base: Base, tmp_path: Path) -> None:
    pair = fuse([random_adapter(base), random_adapter(base, token="<V2>", start=2, seed=1)], method="sum")
    save_adapter(pair, tiny_studio.folder("fused") / "pair.safetensors")
    with pytest.raises(AdapterError, match="<V3>"):
        export(tiny_studio, "fused/pair.safetensors", strengths={"<V3>": 0.5})
    export(tiny_studio, "fused/pair.safetensors", "fp32", strengths={"<V2>": 0.5})
    assert work(tiny_studio) == [State.DONE]
    with zipfile.ZipFile(tiny_studio.file("exports", tiny_studio.jobs.jobs()[0].result["file"])) as archive:
        archive.extractall(tmp_path)
    exported = import_lora(tmp_path / "pair-lora.safetensors", token="<V9>", class_word="dog").deltas()
    kept = load_adapter(tiny_studio.folder("fused") / "pair.safetensors").strengthened({"<V2>": 0.5})
    for key, delta in kept.deltas().items():
        torch.testing.assert_close(exported[key].dense(), delta.dense(), rtol=1e-4, atol=1e-6)
