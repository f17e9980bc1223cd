"""What stands outside the UNet's blocks, adapted: it is trained to the end, and other tools read it as what it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported_loras import LORAS, acting, largest_error, made_of_probes, random_lora
from narrow_bases import FAMILIES, NarrowBase
from short_trainings import BAND, SHORT, prepare_less

from spectral_diffusion.bases.base import Base, load_base
from spectral_diffusion.concepts.concept import Concept
from spectral_diffusion.imports import import_lora
from spectral_diffusion.training import train

ENDS = ("conv_in", "conv_out")
"""The first and the last convolution."""
EMBEDDINGS = ("time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1", "add_embedding.linear_2")
"""What tells the time, and to SDXL the size: LyCORIS' preset `full` and OneTrainer change these without being asked."""


def test_they_are_trained_to_the_end(base: Base, concept: Concept, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_less(monkeypatch)
    result = train(base, concept, BAND, replace(SHORT, steps=2, parametrisation="lora", layers=("to_q", *ENDS, *EMBEDDINGS)))
    (part,) = result.adapter.concepts
    assert result.finished and {"unet.conv_in", "unet.conv_out", "unet.time_embedding.linear_1"} < part.layers.keys()
    assert part.activations and not any(group.startswith("unet.conv") for group in part.activations)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", LORAS)
def test_diffusers_loads_them_and_this_program_too(
    form: str, family: str, narrow_bases: dict[str, NarrowBase], tmp_path: Path
) -> None:
    base = load_base(narrow_bases[family].folder, device="cpu")
    adapter = random_lora(base, endings=(*ENDS, *EMBEDDINGS, "attn1.to_q"))
    deltas = adapter.deltas()
    before = acting(base, tuple(deltas))
    wanted = {key: before[key] + made_of_probes(delta) for key, delta in deltas.items()}
    file = LORAS[form](adapter, tmp_path / "ends.safetensors", dtype=torch.float32).path
    base.pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    assert largest_error(base, adapter, wanted) < 1e-5
    base.pipeline.unload_lora_weights()
    again = import_lora(file, token="<V3>", class_word="snow", base=base)
    assert set(again.layer_keys()) == set(adapter.layer_keys())
    for key in again.layer_keys():
        torch.testing.assert_close(again.delta(key).dense(), deltas[key].dense(), rtol=1e-4, atol=1e-6)
