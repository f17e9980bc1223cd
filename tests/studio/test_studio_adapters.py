"""Adapters in the studio: fused under free names, removed once nothing uses them, exported as strong as was asked for."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from random_adapters import random_adapter
from studios import work

from app.actions.adapters import adapter_cards, export, fuse, remove_adapter, report_file, report_path
from app.actions.concepts import create_concept
from app.actions.pictures import drawing_from, generate
from app.actions.studio import Studio
from app.jobs import State
from spectral_diffusion.adapters import fusion
from spectral_diffusion.adapters.adapter_file import load_adapter, save_adapter
from spectral_diffusion.bases.base import Base
from spectral_diffusion.errors import AdapterError, InputError
from spectral_diffusion.imports import import_lora


def test_nothing_fused_is_overwritten(tiny_studio: Studio, adapters: tuple[Path, Path]) -> None:
    for path in adapters:
        shutil.copyfile(path, tiny_studio.folder("adapters") / path.name)
    names = [card.name for card in adapter_cards(tiny_studio)]
    for _ in range(2):
        fuse(tiny_studio, names, [1.0, 1.0])
    fuse(tiny_studio, names, [1.0, 1.0], title="Mine")
    with pytest.raises(InputError, match="There is a fused adapter 'mine' already, or one is being made"):
        fuse(tiny_studio, names, [1.0, 1.0], title="mine")
    assert work(tiny_studio) == [State.DONE] * 3
    stems = [card.path.stem for card in adapter_cards(tiny_studio, ["fused"])]
    assert len(stems) == 3 and "Mine" in stems


def test_what_was_fused_is_removed_with_its_report_once_nothing_uses_it(tiny_studio: Studio, adapters: tuple[Path, Path]) -> None:
    concept = create_concept(tiny_studio, "<own>", "cat")
    for path, name in zip(adapters, (f"{concept}.safetensors", "other.safetensors"), strict=True):
        shutil.copyfile(path, tiny_studio.folder("adapters") / name)
    names = [card.name for card in adapter_cards(tiny_studio)]
    fuse(tiny_studio, names, [1.0, 1.0], title="other")
    with pytest.raises(InputError, match=r"“Fuse .*” uses .* and is queued; stop it first"):
        remove_adapter(tiny_studio, "adapters/other.safetensors")
    assert {*work(tiny_studio)} == {State.DONE}
    (card,) = adapter_cards(tiny_studio, ["fused"])
    report_path(tiny_studio, card.path).write_text("what it kept")
    remove_adapter(tiny_studio, "adapters/other.safetensors")
    assert report_file(tiny_studio, card) is not None  # it is of the fused one, which is called the same
    generate(tiny_studio, card.name, drawing_from({"prompt": "<V1>", "steps": 1, "count": 1}))
    with pytest.raises(InputError, match=r"uses other .* and is queued; stop it first"):
        remove_adapter(tiny_studio, card.name)
    assert {*work(tiny_studio)} == {State.DONE}
    remove_adapter(tiny_studio, card.name)
    assert [one.name for one in adapter_cards(tiny_studio)] == [f"adapters/{concept}.safetensors"]
    with pytest.raises(InputError, match="is a concept; remove it in the tab Concepts"):
        remove_adapter(tiny_studio, f"adapters/{concept}.safetensors")
    kept = sorted(path.name.split("-", 1)[1] for path in tiny_studio.folder("removed").iterdir())
    assert kept == ["other.html", "other.safetensors", "other.safetensors"]


def test_a_concept_is_exported_as_strong_as_was_asked_for(tiny_studio: Studio, base: Base, tmp_path: Path) -> None:
    pair = fusion.fuse([random_adapter(base), random_adapter(base, token="<V2>", start=2, seed=1)], method="sum")
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
