"""One concept in each parametrisation: how well it is drawn alone, and on which singular directions, strong or weak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.lab.charts import bars, markdown, packed, sheet, unpacked
from benchmarks.lab.record import Case, Record
from benchmarks.lab.workshop import PROMPTS, Workshop


def cases(config: dict[str, Any]) -> Iterator[Case]:
    """Yield every method for every concept and seed."""
    for seed in config["seeds"]:
        for concept in config["concepts"]:
            for method, settings in config["methods"].items():
                slot = settings.get("slot", 0)
                chosen = config["training"] | {key: value for key, value in settings.items() if key != "slot"} | {"seed": seed}
                case = {"name": f"{method} {concept} {seed}", "method": method, "concept": concept, "slot": slot}
                yield case | {"settings": chosen, "pictures": config["pictures"]}


def measure(case: Case, workshop: Workshop) -> dict[str, Any]:
    """Train and draw."""
    adapter = workshop.adapter(case["concept"], case["slot"], case["settings"])
    pictures = workshop.draw(adapter, adapter.tokens[0], case["pictures"])
    firsts = [picture.image for picture in pictures[:: case["pictures"]]]  # of every prompt
    likeness = asdict(workshop.likeness(case["concept"], pictures))
    return likeness | {"parameters": adapter.concepts[0].parameters(), "strip": packed(firsts)}


def show(records: Sequence[Record]) -> tuple[dict[str, Figure], str]:
    """Return the means over concepts and seeds, and a picture of every method for each prompt."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["case"]["method"], []).append(record["result"])
    keys = ("parameters", "identity", "clip_image", "clip_text")
    values = {method: {key: mean(result[key] for result in results) for key in keys} for method, results in groups.items()}
    rows = [
        [method, f"{value['parameters']:,.0f}", *(f"{value[key]:.3f}" for key in keys[1:])]
        for method, value in sorted(values.items(), key=lambda item: -item[1]["clip_image"])
    ]
    scores = {key: [value[key] for value in values.values()] for key in keys[1:]}
    table = markdown(["method", "trained numbers", "identity", "CLIP image", "CLIP text"], rows)
    strips = {method: unpacked(results[0]["strip"]) for method, results in groups.items()}
    pictures = sheet("One concept alone", [prompt.format("<V>") for prompt in PROMPTS], strips)
    return {"scores": bars("One concept alone", list(values), scores), "sheet": pictures}, table
