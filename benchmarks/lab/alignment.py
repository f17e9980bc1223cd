"""What the aligned sum makes of its measurements: how much of them, how it weighs them, and in which layers.

A variant is written as measurements, for the product's own `fuse`: those of all concepts times a factor are another `rho`
(Q^-1 (G_i + rho I) stays as it is when both are scaled), the bare base with a change of zero beside the concepts is the term
`lambda |D G_0^(1/2)|^2`, and layers whose measurements are zero are summed plainly. The judge's identity and what is `lost` of
the concepts' own predictions (see `lost.py`) are both given: here they do not agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from math import sqrt
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.lab.charts import bars, markdown
from benchmarks.lab.fusion import trained
from benchmarks.lab.record import Case, Record
from benchmarks.lab.workshop import Workshop
from spectral_diffusion.adapters.adapter import Adapter, ConceptPart, LayerPart
from spectral_diffusion.adapters.attach import attached
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.joining import RHO
from spectral_diffusion.training.activations import PROMPTS, measure_activations

_BASE = "<base>"
_SEED = 5


def cases(config: dict[str, Any]) -> Iterator[Case]:
    """Yield every variant for each number of concepts."""
    for seed in config["seeds"]:
        for count in config["counts"]:
            names = config["concepts"][:count]
            for variant, changes in config["variants"].items():
                case = {"name": f"{count} {variant} {seed}", "variant": variant, "changes": changes, "concepts": names}
                yield case | trained(config["training"], names, config["concepts"], seed) | {"pictures": config["pictures"]}


def measure(case: Case, workshop: Workshop) -> dict[str, Any]:
    """Join the concepts of a case by its variant of the aligned sum; draw and judge each with all attached."""
    adapters = [workshop.adapter(name, slot, case["settings"], case["group"]) for slot, name in enumerate(case["concepts"])]
    fused = fuse(_variant(workshop, adapters, **case["changes"]), method="aligned", allow_overlap=True)
    concepts = {}
    tokens = [adapter.tokens[0] for adapter in adapters]
    for name, token, share in zip(case["concepts"], tokens, workshop.lost(fused, adapters), strict=True):
        pictures = workshop.draw(fused, token, case["pictures"])
        concepts[name] = asdict(workshop.likeness(name, pictures)) | {"lost": share}
    return {"concepts": concepts}


def _variant(
    workshop: Workshop,
    adapters: Sequence[Adapter],
    *,
    rho: float = RHO,
    base: float = 0.0,
    drawings: int | None = None,
    columns: int | None = None,
    where: str = "",
) -> list[Adapter]:
    """Return `adapters` with the measurements from which the product's aligned sum makes another one.

    Args:
        rho: weight of staying near the plain sum.
        base: the weight lambda of changing nothing of what the bare base reads when it draws class words.
        drawings: measure again, on so many prompts; None: what the files keep, of all.
        columns: so many leading eigenvectors of every Gram matrix; None: what the files keep.
        where: beginning of the layers that are aligned, `text_encoder` or `unet`; the others are summed plainly.
    """
    parts = [adapter.concepts[0] for adapter in adapters]
    keys = tuple(parts[0].layers)
    measured = [dict(part.activations) for part in parts]
    if drawings:
        measured = []
        for adapter in adapters:
            with attached(workshop.base, adapter):
                measured.append(measure_activations(workshop.base, adapter.words[0], keys, _SEED, PROMPTS[:drawings]))
    factors = [1.0] * len(parts)
    if base:
        words = dict.fromkeys(part.class_word for part in parts)
        own = [measure_activations(workshop.base, f"a {word}", keys, _SEED) for word in words]
        measured.append({group: torch.cat([one[group] for one in own], dim=1) / sqrt(len(own)) for group in own[0]})
        parts.append(_nothing(parts[0]))
        factors.append(sqrt(base))
    changed = []
    for part, activations, factor in zip(parts, measured, factors, strict=True):
        kept = {
            group: factor * sqrt(RHO / rho) * matrix.float()[:, -(columns or matrix.shape[1]) :] * _is_in(group, where)
            for group, matrix in activations.items()
        }
        changed.append(replace(adapters[0], concepts=(replace(part, activations=kept),), weights=(1.0,)))
    return changed


def _is_in(group: str, where: str) -> bool:
    return (group if group.startswith("text_encoder") else "unet").startswith(where)


def _nothing(part: ConceptPart) -> ConceptPart:
    """Return a concept without a token of its own that changes nothing in the layers of `part`."""
    zero = {key: torch.zeros(sum(layer.shape), 1) for key, layer in part.layers.items()}
    layers = {
        key: LayerPart(band=None, tensors={"up": zero[key][: layer.shape[0]], "down": zero[key][layer.shape[0] :]})
        for key, layer in part.layers.items()
    }
    return ConceptPart(token=_BASE, class_word="base", band=None, parametrisation="lora", embeddings={}, layers=layers)


def show(records: Sequence[Record]) -> tuple[dict[str, Figure], str]:
    """Return what is lost by variant, and the table."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for record in records:
        results = record["result"]["concepts"].values()
        means = {key: mean(result[key] for result in results) for key in ("lost", "identity")}
        found.setdefault(record["case"]["variant"], {})[len(results)] = means
    counts = sorted({count for values in found.values() for count in values})
    header = ["variant", *(f"lost, {count} concepts" for count in counts), *(f"identity, {count}" for count in counts)]
    rows = [
        [variant, *(f"{values[count][key]:.2f}" if count in values else "" for key in ("lost", "identity") for count in counts)]
        for variant, values in found.items()
    ]
    scores = {f"{count} concepts": [values.get(count, {"lost": 0.0})["lost"] for values in found.values()] for count in counts}
    return {"lost": bars("Lost of each concept's own predictions", list(found), scores)}, markdown(header, rows)
