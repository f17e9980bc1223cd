"""How much of each concept is left when several are joined: every method trains, joins and draws in the same way.

Identity is the judge's: the share of pictures in which its first answer is the concept. The whole joined adapter is attached, as
an exported file is. What is `lost` of a concept's own predictions tells methods apart with less noise (see `lost.py`). `alone`
cases are shared by all methods that train alike. All concepts of an experiment are trained in one pass where the form can be
stacked, which is the same as one after the other and faster, as none is attached while another learns. A training with
`together = true` trains those of a case in one go, among each other; there each number of concepts has `alone` cases of its own.
A method with `settling` settles the concepts for so many steps before they are joined.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise, product
from math import ceil
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from benchmarks.lab.charts import bars, lines, markdown, packed, sheet, unpacked
from benchmarks.lab.record import Case, Record
from benchmarks.lab.workshop import PROMPTS, Workshop
from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.parametrisations import TUNERS
from spectral_diffusion.prompts.tokens import listed
from spectral_diffusion.training import settle

_JOINT = (2, 3)
"""So many of the concepts are drawn in one picture: each with those after it, the last with the first."""


def cases(config: dict[str, Any]) -> Iterator[Case]:
    """Yield, for more and more concepts, each concept alone and then every method."""
    shared = {"pictures": config["pictures"]}
    for seed in config["seeds"]:
        for before, count in pairwise([0, *config["counts"]]):
            names = config["concepts"][:count]
            trainings = {label: config["training"] | training for label, training in config["trainings"].items()}
            of_label = {label: trained(training, names, config["concepts"], seed) for label, training in trainings.items()}
            for label, training in of_label.items():
                together = trainings[label].get("together", False)
                of = f" of {count}" if together else ""
                for slot, name in list(enumerate(names))[0 if together else before :]:
                    case = {"name": f"{name}{of} alone {label} {seed}", "kind": "alone", "training": label, "concept": name}
                    yield case | {"slot": slot} | training | shared
            for method, choice in config["methods"].items():
                case = {"name": f"{count} {method} {seed}", "kind": "fused", "method": method, **choice, "concepts": names}
                yield case | of_label[choice["training"]] | shared


def trained(training: dict[str, Any], names: list[str], everybody: list[str], seed: int) -> dict[str, Any]:
    """Return the settings of a training and the `group` that is trained in one pass; apart, none is attached for another."""
    settings = training | {"seed": seed}
    if training.get("together"):
        return {"settings": settings, "group": names}
    one_by_one = settings.get("parametrisation") in TUNERS
    return {"settings": settings | {"presence": 0.0}, "group": [] if one_by_one else everybody}


def measure(case: Case, workshop: Workshop) -> dict[str, Any]:
    """Draw and judge one concept alone, or all of a fused adapter."""
    if case["kind"] == "alone":
        adapter = workshop.adapter(case["concept"], case["slot"], case["settings"], case["group"])
        pictures = workshop.draw(adapter, adapter.tokens[0], case["pictures"])
        (part,) = adapter.concepts
        return asdict(workshop.likeness(case["concept"], pictures)) | {"parameters": part.parameters()}
    adapters = [workshop.adapter(name, slot, case["settings"], case["group"]) for slot, name in enumerate(case["concepts"])]
    if case.get("settling"):
        settled = [result.adapter for result in settle(workshop.base, adapters, steps=case["settling"])]
        fused = fuse(settled, method=case["fuser"])
    else:
        fused = fuse(adapters, method=case["fuser"])
    concepts, strip = {}, []
    for name, token, share in zip(case["concepts"], fused.tokens, workshop.lost(fused, adapters), strict=True):
        pictures = workshop.draw(fused, token, case["pictures"])
        concepts[name] = asdict(workshop.likeness(name, pictures)) | {"lost": share}
        strip.append(pictures[0].image)
    joint = {}
    for things in _JOINT:
        if things <= len(adapters):
            image, joint[str(things)] = _together(workshop, fused, case["concepts"], things, case["pictures"])
            strip.append(image)
    return {"concepts": concepts, "joint": joint, "strip": packed(strip)}


def _together(workshop: Workshop, fused: Adapter, names: Sequence[str], things: int, pictures: int) -> tuple[Image.Image, float]:
    """Draw `things` of `names` in one picture, in turn all that follow each other, scene after scene.

    Returns the first picture and the share of all in which the judge sees exactly those that were asked for.
    """
    places = range(len(names))
    groups = list(dict.fromkeys(tuple(sorted((first + step) % len(names) for step in range(things))) for first in places))
    rounds = ceil(len(PROMPTS) * pictures / len(groups))
    images, asked = [], []
    for turn, (number, group) in product(range(rounds), enumerate(groups)):
        prompt = PROMPTS[(turn + number) % len(PROMPTS)].format(listed([fused.tokens[place] for place in group]))
        drawn = generate(workshop.base, Drawing(prompt=prompt, seed=77_000 + turn), fused, whole=True)
        images += [picture.image for picture in drawn]
        asked.append({names[place] for place in group})
    looks = workshop.judge.look(images)
    seen = [{sighting.character for sighting in look[:things]} for look in looks]
    return images[0], mean(float(one == other) for one, other in zip(seen, asked, strict=True))


def show(records: Sequence[Record]) -> tuple[dict[str, Figure], str]:
    """Return identity by number of concepts, and the table with the standard deviation over seeds, as of a sample.

    What was joined of concepts that were not all drawn alone yet is left out.
    """
    alone = {_key(r["case"], r["case"]["concept"]): r["result"] for r in records if r["case"]["kind"] == "alone"}
    fused = [r for r in records if r["case"]["kind"] == "fused"]
    fused = [r for r in fused if all(_key(r["case"], name) in alone for name in r["case"]["concepts"])]
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    for record in fused:
        case = record["case"]
        before = [alone[_key(case, name)] for name in case["concepts"]]
        after = [record["result"]["concepts"][name] for name in case["concepts"]]
        figures = {f"{key} {when}": mean(one[key] for one in group) for when, group in (("alone", before), ("fused", after))
                   for key in ("identity", "clip_image", "clip_text")}  # fmt: skip
        figures["lost"] = mean(one["lost"] for one in after)
        figures |= {f"joint {things}": share for things, share in record["result"]["joint"].items()}
        found.setdefault((len(case["concepts"]), case["method"]), []).append(figures)
    rows = []
    for (count, method), runs in sorted(found.items()):
        value = {key: mean(run[key] for run in runs) for key in runs[0]}
        spread = f" ± {stdev(run['identity fused'] for run in runs):.2f}" if len(runs) > 1 else ""
        images = f"{value['clip_image alone']:.3f} / {value['clip_image fused']:.3f}"
        texts = f"{value['clip_text alone']:.3f} / {value['clip_text fused']:.3f}"
        kept = f"{value['identity fused'] / value['identity alone']:.2f}" if value["identity alone"] else ""
        identity = [f"{value['identity alone']:.2f}", f"{value['identity fused']:.2f}{spread}", kept, f"{value['lost']:.2f}"]
        joint = [f"{value[name]:.2f}" if (name := f"joint {things}") in value else "" for things in _JOINT]
        rows.append([str(count), method, str(len(runs)), *identity, images, texts, *joint])
    header = [
        "concepts",
        "method",
        "seeds",
        "alone",
        "fused",
        "kept",
        "lost",
        "CLIP image alone / fused",
        "CLIP text alone / fused",
        "two",
        "three",
    ]
    if not rows:
        return {}, ""
    sheets = {}
    for count in sorted({count for count, _ in found}):
        chosen = [r for r in fused if len(r["case"]["concepts"]) == count]
        first = [r for r in chosen if r["case"]["settings"]["seed"] == chosen[0]["case"]["settings"]["seed"]]
        strips = {r["case"]["method"]: unpacked(r["result"]["strip"]) for r in first}
        names = [*chosen[0]["case"]["concepts"], *(f"the first {things}" for things in chosen[0]["result"]["joint"])]
        sheets[f"sheet-{count}"] = sheet(f"{count} concepts: each by its token, then several in one picture", names, strips)
    return {"identity": _chart(found)} | sheets, markdown(header, rows)


def _chart(found: Mapping[tuple[int, str], Sequence[Mapping[str, float]]]) -> Figure:
    """Return identity after fusing by the number of concepts; where there is one number, beside that of each alone."""
    counts = sorted({count for count, _ in found})
    shares = {
        when: {key: mean(run[f"identity {when}"] for run in runs) for key, runs in found.items()} for when in ("alone", "fused")
    }
    if len(counts) == 1:
        methods = [method for _, method in found]
        return bars(f"Identity of {counts[0]} concepts", methods, {when: list(of.values()) for when, of in shares.items()})
    curves: dict[str, list[tuple[float, float]]] = {}
    for (count, method), share in shares["fused"].items():
        curves.setdefault(method, []).append((count, share))
    return lines("Identity after fusing", "concepts", "share right", curves)


def _key(case: Case, name: str) -> tuple[str, str, int, int]:
    return case["training"], name, case["settings"]["seed"], len(case["group"])
