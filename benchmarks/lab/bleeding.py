"""Why the plain sum loses a concept: it keeps its own whole change, and of the others' only one part acts.

Of an additive change `(A s + U c) V^T + U s B^T + A s B^T`, `s` being the values as trained, the first term reads the band alone,
the second writes the band alone, the third does neither, as a LoRA. A part is a term, or some layers, or both; what is `lost` of
a concept's own predictions then (see `lost.py`) is what that part of the others' changes does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.lab.charts import bars, markdown
from benchmarks.lab.fusion import trained
from benchmarks.lab.record import Case, Record
from benchmarks.lab.workshop import Workshop
from spectral_diffusion.adapters.adapter import Adapter, ConceptPart, LayerPart
from spectral_diffusion.adapters.fusion import fuse

_READS, _WRITES, _NEITHER = "reads the band", "writes the band", "neither"
TERMS = (_READS, _WRITES, _NEITHER)


def cases(config: dict[str, Any]) -> Iterator[Case]:
    """Yield every part of every training's changes."""
    names = config["concepts"]
    for seed in config["seeds"]:
        for label, changes in config["trainings"].items():
            of = trained(config["training"] | changes, names, names, seed)
            for part, choice in config["parts"].items():
                if of["settings"]["parametrisation"] == "additive" or "term" not in choice:
                    yield {"name": f"{label} {part} {seed}", "training": label, "part": part, **choice, "concepts": names} | of


def measure(case: Case, workshop: Workshop) -> dict[str, Any]:
    """Return what is lost of each concept beside the parts of the others."""
    adapters = [workshop.adapter(name, slot, case["settings"], case["group"]) for slot, name in enumerate(case["concepts"])]
    parts = [part_of(adapter, case.get("term"), case.get("layers", [""])) for adapter in adapters]
    lost = {}
    for place, (name, whole) in enumerate(zip(case["concepts"], adapters, strict=True)):
        fused = fuse([whole, *parts[:place], *parts[place + 1 :]], method="sum", allow_overlap=True)
        (lost[name],) = workshop.lost(fused, [whole])
    return {"lost": lost}


def part_of(adapter: Adapter, term: str | None, layers: Sequence[str]) -> Adapter:
    """Return `adapter` with one term of its change, all of it without `term`, in the layers whose keys hold one of `layers`."""
    (concept,) = adapter.concepts
    chosen = {key: _term(concept, key, term) for key in concept.layers if any(word in key for word in layers)}
    return replace(adapter, concepts=(replace(concept, layers=chosen, parametrisation="lora", band=None, activations={}),))


def _term(concept: ConceptPart, key: str, term: str | None) -> LayerPart:
    delta, part = concept.delta(key), concept.layers[key]
    up, down = delta.up, delta.down
    if term is not None:
        band, A, B, s = part.band, part.tensors["A"], part.tensors["B"], part.band.s + part.tensors["c"]
        terms = {_READS: (A * s + band.U * part.tensors["c"], band.V), _WRITES: (band.U * s, B), _NEITHER: (A * s, B)}
        up, down = terms[term]
    return LayerPart(band=None, tensors={"up": up, "down": down})


def show(records: Sequence[Record]) -> tuple[dict[str, Figure], str]:
    """Return what is lost by part, and the table."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        case, lost = record["case"], mean(record["result"]["lost"].values())
        found.setdefault(case["part"], {}).setdefault(case["training"], []).append(lost)
    trainings = list(dict.fromkeys(record["case"]["training"] for record in records))
    means = {part: {training: mean(runs) for training, runs in of.items()} for part, of in found.items()}
    rows = [[part, *(f"{of[training]:.2f}" if training in of else "" for training in trainings)] for part, of in means.items()]
    groups = {training: [of.get(training, 0.0) for of in means.values()] for training in trainings}
    figure = bars("Lost of each concept beside one part of the others' changes", list(means), groups)
    return {"bleeding": figure}, markdown(["what acts of the others", *trainings], rows)
