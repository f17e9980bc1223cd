"""Import of pickles: their tensors are read, and nothing in them is ever run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from checkpoints import Trap
from exported_loras import assert_same_deltas, imported, random_lora
from safetensors.torch import load_file

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.bases.base import Base
from spectral_diffusion.errors import InputError
from spectral_diffusion.export import export_diffusers, export_kohya


@pytest.fixture
def lora(base: Base) -> Adapter:
    return random_lora(base, "<V1>")


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "old.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_lora_in_a_pickle_is_read(name: str, zipped: bool, base: Base, lora: Adapter, tmp_path: Path) -> None:
    tensors = load_file(export_diffusers(lora, tmp_path / "a.safetensors", dtype=torch.float32).path)
    torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert_same_deltas(imported(tmp_path / name, base=base), lora)


def test_a_lora_with_code_is_refused_and_never_run(tmp_path: Path) -> None:
    torch.save({"lora_unet_x.lora_up.weight": Trap(tmp_path / "made")}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt' is damaged or holds more than tensors, which is never loaded"):
        imported(tmp_path / "x.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", ["a1111", "diffusers"])
def test_embeddings_in_pickles_are_read_without_running_them(content: str, lora: Adapter, tmp_path: Path) -> None:
    vectors = torch.randn(2, 48)
    record = {"string_to_param": {"*": vectors}, "name": "x", "step": 3} if content == "a1111" else {"<x>": vectors[0]}
    torch.save(record, tmp_path / "x.pt")
    export_kohya(lora, tmp_path / "a.safetensors")
    adapter = imported(tmp_path / "a.safetensors", embedding=tmp_path / "x.pt")
    expected = vectors if content == "a1111" else vectors[:1]
    assert torch.equal(adapter.concepts[0].embeddings["text_encoder"], expected)


def test_a_pickle_with_code_is_refused_and_never_run(lora: Adapter, tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": Trap(tmp_path / "made")}}, tmp_path / "x.pt")
    export_kohya(lora, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"x\.pt' is damaged or holds more than tensors, which is never loaded"):
        imported(tmp_path / "a.safetensors", embedding=tmp_path / "x.pt")
    assert not (tmp_path / "made").exists()


def test_a_pickle_that_is_damaged_inside_is_refused(lora: Adapter, tmp_path: Path) -> None:
    torch.save({"<x>": torch.ones(1, 48)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "x.pt").read_bytes()
    storage = re.search(rb"\d{9,}", content)[0]
    (tmp_path / "x.pt").write_bytes(content.replace(storage, storage[::-1], 1))
    export_kohya(lora, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"x\.pt' is damaged"):
        imported(tmp_path / "a.safetensors", embedding=tmp_path / "x.pt")
