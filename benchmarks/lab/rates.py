"""Learning rates: every parametrisation at several, on concepts that no other experiment shows.

What comes out is put into the other experiments' configurations by hand, so that each rival is tuned as fairly as ours. The text
encoder's rate is a fixed share of the UNet's. A rate is chosen by CLIP's likeness to the photos, of the concepts alone and, for
parametrisations that are fused elsewhere, in their plain sum: of few pictures it says more than the share that the judge knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.lab.charts import lines, markdown
from benchmarks.lab.record import Case, Record
from benchmarks.lab.workshop import Workshop
from spectral_diffusion.adapters.fusion import fuse

_TEXT_ENCODER = 0.3


def cases(config: dict[str, Any]) -> Iterator[Case]:
    """Yield every method at every rate, with two concepts where it is fused and one where it is not."""
    for method, choice in config["methods"].items():
        for rate in choice["rates"]:
            settings = config["training"] | choice["settings"] | {"unet_rate": rate, "text_encoder_rate": _TEXT_ENCODER * rate}
            concepts = config["concepts"] if choice["fused"] else config["concepts"][:1]
            case = {"name": f"{method} {rate:g}", "method": method, "settings": settings, "concepts": concepts}
            yield case | {"pictures": config["pictures"]}


def measure(case: Case, workshop: Workshop) -> dict[str, Any]:
    """Train each concept by itself, draw it alone, and again with all of them attached."""
    names = case["concepts"]
    adapters = [workshop.adapter(name, slot, case["settings"]) for slot, name in enumerate(names)]
    drawn = [workshop.draw(adapter, adapter.tokens[0], case["pictures"]) for adapter in adapters]
    alone = [workshop.likeness(name, pictures) for name, pictures in zip(names, drawn, strict=True)]
    result = {"alone": [asdict(likeness) for likeness in alone]}
    if len(names) > 1:
        fused = fuse(adapters, method="sum")
        drawn = [workshop.draw(fused, adapter.tokens[0], case["pictures"]) for adapter in adapters]
        result["fused"] = [asdict(workshop.likeness(name, pictures)) for name, pictures in zip(names, drawn, strict=True)]
    return result


def show(records: Sequence[Record]) -> tuple[dict[str, Figure], str]:
    """Return the likeness by rate, and the table in which the best rate of every method stands out."""
    rows, curves = [], {}
    for method, group in groupby(records, key=lambda record: record["case"]["method"]):
        found = [(record["case"]["settings"]["unet_rate"], record["result"]) for record in group]
        best = max(found, key=lambda one: _order(one[1]))[0]
        for rate, result in found:
            alone, fused = _means(result["alone"]), _means(result["fused"]) if "fused" in result else ["", ""]
            name = f"**{rate:g}**" if rate == best else f"{rate:g}"
            rows.append([method, name, *alone, *fused])
        curves[method] = [(rate, mean(one["clip_image"] for one in result["alone"])) for rate, result in found]
    figure = lines("Likeness alone by learning rate", "rate of the UNet's layers", "CLIP image", curves, log=True)
    return {"rates": figure}, markdown(["method", "rate", "alone", "CLIP image", "summed", "CLIP image"], rows)


def _order(result: dict[str, Any]) -> float:
    return mean(one["clip_image"] for one in [*result["alone"], *result.get("fused", [])])


def _means(likenesses: Sequence[dict[str, float]]) -> list[str]:
    return [f"{mean(one['identity'] for one in likenesses):.2f}", f"{mean(one['clip_image'] for one in likenesses):.3f}"]
