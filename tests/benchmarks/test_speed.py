"""What a step keeps in memory and what is written, beside LoRA through PEFT: figures without noise, so bounds that hold."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.speed import (
    LARGE,
    file_bytes,
    kept_bytes,
    loss_of,
    measure_steps,
    measure_utilisation,
    random_batch,
    random_models,
)
from benchmarks.step_methods import METHODS, Models
from benchmarks.whole_training import measure_training
from spectral_diffusion.bases.base import load_base
from spectral_diffusion.training import TrainingSettings


@pytest.fixture(scope="module")
def models() -> Models:
    """SD1.5 at a tenth of its width."""
    torch.manual_seed(0)
    return random_models(0.1, torch.device("cpu"), torch.float32)


def kept(models: Models, name: str, rank: int) -> int:
    with METHODS[name](models, rank) as method:
        return kept_bytes(models, method, random_batch(models, 1, 64))


def test_a_step_keeps_little_more_than_lora_and_far_less_than_the_dense_form(models: Models) -> None:
    lora = kept(models, "peft_lora", 1)
    # a direction of these layers weighs as much as ten of the true ones
    assert kept(models, "additive", 1) <= 1.05 * lora
    assert kept(models, "dense", 1) >= 2 * lora
    assert kept(models, "frozen", 1) < lora


def test_the_trained_numbers_are_those_of_lora_and_one_per_direction(models: Models, tmp_path: Path) -> None:
    counts, sizes = {}, {}
    for name in ("additive", "peft_lora"):
        with METHODS[name](models, 2) as method:
            counts[name] = sum(parameter.numel() for parameter in method.parameters)
            sizes[name] = file_bytes(method.parameters, tmp_path)
    assert counts["additive"] == counts["peft_lora"] + 2 * len(models.layers)
    assert sizes["additive"] <= 1.02 * sizes["peft_lora"]


def test_pefts_lora_is_multiplied_in_the_precision_of_the_base() -> None:
    """In float32 beside weights in bfloat16 it would be slower on a GPU than it is as others train it."""
    models, seen = random_models(0.1, torch.device("cpu"), torch.bfloat16), set()
    with METHODS["peft_lora"](models, 2) as method:
        for module in models.unet.modules():
            if type(module).__module__.startswith("peft.tuners.lora"):
                for factor in (*module.lora_A.values(), *module.lora_B.values()):
                    factor.register_forward_hook(lambda module, values, made: seen.add((values[0].dtype, made.dtype)))
        loss_of(models, method, random_batch(models, 1, 64)).backward()
        assert {(parameter.dtype, parameter.grad.dtype) for parameter in method.parameters} == {(torch.float32, torch.float32)}
    assert seen == {(torch.bfloat16, torch.bfloat16)}


def test_methods_step_and_leave_the_models_as_they_are(models: Models, tmp_path: Path) -> None:
    before = [set(model.modules()) for model in (models.unet, models.text_encoder)]
    result = measure_steps(models, ("additive", "peft_lora"), 1, 1, 64, again=True, rounds=1, folder=tmp_path)
    assert all(row["seconds"] > 0 and math.isfinite(row["over_peft"]["seconds"]) for row in result["methods"].values())
    assert [set(model.modules()) for model in (models.unet, models.text_encoder)] == before
    assert not any(module._forward_hooks for module in models.unet.modules())
    assert not any(parameter.requires_grad for parameter in models.unet.parameters())


def test_the_additive_step_is_compared_with_a_large_matrix_product(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LARGE, "cpu", 512)
    figures = measure_utilisation(models, 1, 1, 64, rounds=1)
    assert 0 < figures["utilisation"] < 1


@pytest.mark.usefixtures("less_preparation")
@pytest.mark.parametrize("precision", [torch.float32, torch.float16], ids=str)  # of a base on a CPU and on a GPU
def test_a_whole_training_is_measured(precision: torch.dtype, tiny_base_folder: Path) -> None:
    settings = TrainingSettings(steps=4, batch=1, inert_batch=1, rank=2)
    figures = measure_training(load_base(tiny_base_folder, device="cpu", precision=precision), settings)
    assert 0 < figures["step_seconds"] < figures["training_seconds"]
    assert figures["picture_seconds"] > 0 and figures["over_diffusers"] > 0
