"""Likeness against the number of trained numbers, and which budgets a parametrisation can choose at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.lab import single
from benchmarks.lab.charts import lines, markdown
from benchmarks.lab.record import Case, Record
from benchmarks.lab.workshop import Workshop
from spectral_diffusion.parametrisations.budget import parameter_count

_RANKS = range(1, 65)


def cases(config: dict[str, Any]) -> Iterator[Case]:
    """Yield every parametrisation at every rank, for every concept and seed."""
    for seed in config["seeds"]:
        for concept in config["concepts"]:
            for method, choice in config["methods"].items():
                for rank in choice["ranks"]:
                    settings = config["training"] | choice.get("settings", {})
                    case = {"name": f"{method} {rank} {concept} {seed}", "method": method, "concept": concept, "slot": 0}
                    yield case | {
                        "settings": settings | {"parametrisation": method, "rank": rank, "seed": seed},
                        "pictures": config["pictures"],
                    }


def measure(case: Case, workshop: Workshop) -> dict[str, Any]:
    """Train and draw, and count the budgets that the parametrisation could have had instead."""
    shapes = workshop.shapes(workshop.settings(case["settings"]))
    counts = sorted({parameter_count(case["method"], shapes, rank) for rank in _RANKS if _possible(case["method"], shapes, rank)})
    return single.measure(case, workshop) | {"budgets": counts}


def _possible(method: str, shapes: Sequence[tuple[int, int]], rank: int) -> bool:
    return method != "oft" or (rank > 1 and all(into % rank == 0 for _, into in shapes))


def show(records: Sequence[Record]) -> tuple[dict[str, Figure], str]:
    """Return likeness by budget, and how fine the budgets are."""
    points: dict[str, dict[int, list[float]]] = {}
    budgets: dict[str, list[int]] = {}
    for record in records:
        method, result = record["case"]["method"], record["result"]
        points.setdefault(method, {}).setdefault(result["parameters"], []).append(result["clip_image"])
        budgets[method] = result["budgets"]
    curves = {method: [(count, mean(values)) for count, values in found.items()] for method, found in points.items()}
    rows = []
    for method, counts in budgets.items():
        near = [count for count in counts if 1_000 <= count <= 800_000]
        span = f"{min(counts):,} to {max(counts):,}"
        rows.append([method, span, str(len(near)), "; ".join(f"{x:,}: {y:.3f}" for x, y in sorted(curves[method]))])
    figure = lines("Likeness by trained numbers", "trained numbers", "CLIP image", curves, log=True)
    header = ["parametrisation", "smallest to largest, ranks 1 to 64", "budgets from 1 k to 800 k", "trained numbers: CLIP image"]
    return {"efficiency": figure}, markdown(header, rows)
