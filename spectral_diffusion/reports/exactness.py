"""Measure how exact fusing and exporting are, instead of believing it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.bases.base import Base, adaptable_layers, load_base
from spectral_diffusion.bases.layer_matrix import matrix_of
from spectral_diffusion.joining import weighted_sum


def fusion_error(base: Base, adapter: Adapter) -> float:
    """Return the largest relative difference, over all layers, of three ways to write the plain sum of strengths 1.

    Compared in Frobenius norm with the sum of the concepts' dense deltas are the joined low-rank delta, and the base with
    every concept's band replaced in one singular value decomposition, less the base. Additive parametrisation only.
    """
    layers = adaptable_layers(base, None)
    worst = 0.0
    for key in adapter.layer_keys():
        parts = [concept for concept in adapter.concepts if key in concept.layers]
        deltas = [concept.delta(key) for concept in parts]
        summed = sum(delta.dense().double() for delta in deltas)
        joined = weighted_sum(deltas, [1.0] * len(deltas)).dense().double()
        weight = matrix_of(layers[key]).detach().cpu().double()
        plugged = weight.clone()
        for concept in parts:
            band, tensors = concept.layers[key].band, concept.layers[key].tensors
            U, s, V = band.U.double(), band.s.double(), band.V.double()
            A, B, c = (tensors[name].double() for name in ("A", "B", "c"))
            plugged += (U + A) @ torch.diag(s + c) @ (V + B).T - U @ torch.diag(s) @ V.T
        worst = max(worst, _relative(joined, summed), _relative(plugged - weight, summed))
    return worst


def export_error(base: Base, adapter: Adapter, lora: Path) -> float:
    """Return the largest relative difference of any layer's delta after loading the file `lora` with diffusers."""
    fresh = load_base(base.source, device="cpu")
    fresh.pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    loaded = _loaded_deltas(fresh)
    deltas = adapter.deltas()
    missing = set(deltas) - set(loaded)
    if missing:
        return float("inf")
    return max(_relative(loaded[key], deltas[key].dense().double()) for key in deltas)


def _loaded_deltas(base: Base) -> dict[str, torch.Tensor]:
    deltas = {}
    for part, model in (("unet", base.pipeline.unet), *base.text_encoders.items()):
        for path, module in model.named_modules():
            if hasattr(module, "lora_A") and isinstance(module, nn.Module):
                name = next(iter(module.lora_A))
                up, down = module.lora_B[name].weight.detach(), module.lora_A[name].weight.detach()
                key = f"{part}.{path.removeprefix('text_model.')}"
                deltas[key] = module.scaling[name] * (up.double().flatten(1) @ down.double().flatten(1))
    return deltas


def _relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm().clamp(min=1e-12))
