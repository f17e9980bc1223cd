"""Is each concept in its place? `python -m benchmarks.composition --json PATH`

Sample concepts are trained on the embedded base and drawn together, in eight scenes by turns. A picture is right
when the judge's strongest sighting in each column of it is the concept that the prompt names there. Rows:

- how many concepts, and whether two of them have the same class word;
- how they are drawn: `prompt` (the plain prompt), `regions` (a column for each, `--regions auto`), `confined` (each concept
  in its own column by its own model), `sketch` (a column for each, confined or not as is the default, and following a sketch: the
  outlines of each concept's mask in one of its photos, side by side, as large as the toy world has so many things);
- how they were trained and joined: `in one go` (all in one go, plain sum) and `LoRA in one go`; and each by itself: `aligned`
  (spectral, aligned sum), `settled` (spectral, taught their plain sum), `sum` (spectral, plain sum),
  `LoRA` (plain sum).

`speed` is the time of a prompt with three regions over that of the plain prompt, by medians of alternating drawings.

Adapters and pictures are kept below `--folder`; what is there is not made again, so that a run goes on where it was stopped.
The sheet beside the JSON shows the best and the worst of each row.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.lab.record import digest
from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.adapter_file import load_adapter, save_adapter
from spectral_diffusion.adapters.band_plan import fewest_directions
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base, load_base
from spectral_diffusion.concepts.concept import SAMPLES_FOLDER, Concept, load_concept
from spectral_diffusion.files import write_atomically
from spectral_diffusion.generation.condition_picture import Condition
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.generation.picture_file import save_picture
from spectral_diffusion.generation.regions import suggest_regions
from spectral_diffusion.prompts.tokens import listed
from spectral_diffusion.reports.contact_sheet import Cell, Row, contact_sheet
from spectral_diffusion.spectra.bands import bands_in_order
from spectral_diffusion.toyworld.judge import Judge, Sighting, load_judge
from spectral_diffusion.toyworld.recipe.sketches import silhouettes
from spectral_diffusion.toyworld.scenes import SCENES
from spectral_diffusion.training import TrainingSettings, preset, settle, train_together

GROUPS: dict[str, tuple[tuple[str, ...], ...]] = {
    "two": (("poodle", "black-cat"), ("wizard", "leopard")),
    "two of one class": (("poodle", "service-dog"), ("leopard", "black-cat")),
    "three": (("poodle", "wizard", "black-cat"), ("leopard", "wizard", "service-dog")),
    "three, two of one class": (("poodle", "black-cat", "service-dog"), ("leopard", "black-cat", "wizard")),
}
CONCEPTS = tuple(dict.fromkeys(name for groups in GROUPS.values() for names in groups for name in names))
WAYS: dict[str, dict[str, bool | None]] = {
    "prompt": {"regional": False, "confined": False, "sketched": False},
    "regions": {"regional": True, "confined": False, "sketched": False},
    "confined": {"regional": True, "confined": True, "sketched": False},
    "sketch": {"regional": True, "confined": None, "sketched": True},
}
JOININGS = {
    "in one go": ("additive", True, "sum"),
    "LoRA in one go": ("lora", True, "sum"),
    "aligned": ("additive", False, "aligned"),
    "settled": ("additive", False, "settled"),
    "sum": ("additive", False, "sum"),
    "LoRA": ("lora", False, "sum"),
}
"""Parametrisation, whether all concepts are trained in one go, and how they are joined, by the name of the row."""
SHOWN = 5
SKETCHED_HEIGHTS = {2: 0.47, 3: 0.35}
"""How high a thing stands in a sketch of two and of three, in parts of the picture."""
GROUND = 0.9
SPEED_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A picture, what was strongest in each column, and how confidently where that is the concept asked for; 0 where not."""

    image: Image.Image
    seen: tuple[str, ...]
    confidences: tuple[float, ...]

    @property
    def right(self) -> bool:
        """Whether every concept is in its place."""
        return all(self.confidences)


def training_settings(base: Base, name: str, form: str, together: bool) -> TrainingSettings:
    """Return how the concepts of a joining are trained: as the preset `name` says, at the rates that are best for the form."""
    settings = preset(name, base, concepts=len(CONCEPTS) if together else 1, changes={"parametrisation": form})
    return settings if together else replace(settings, isolation=len(CONCEPTS))


def trained(base: Base, together: bool, settings: TrainingSettings, folder: Path) -> dict[str, Adapter]:
    """Return an adapter for each of `CONCEPTS`, from `folder` where it was trained before."""
    directions = fewest_directions(base, settings.layers)
    bands = dict(zip(CONCEPTS, bands_in_order(settings.rank, directions, weakest_first=settings.weakest_first), strict=False))
    for names in [CONCEPTS] if together else [(name,) for name in CONCEPTS]:
        files = [folder / f"{name}.safetensors" for name in names]
        if all(file.exists() for file in files):
            continue
        print(f"training {', '.join(names)} ({settings.parametrisation})", flush=True)
        checkpoint = folder / f"{names[0]}.checkpoint"
        concepts = [(load_concept(SAMPLES_FOLDER / name), bands[name]) for name in names]
        for file, result in zip(files, train_together(base, concepts, settings, checkpoint=checkpoint), strict=True):
            save_adapter(result.adapter, file)
        checkpoint.unlink(missing_ok=True)
    return {name: load_adapter(folder / f"{name}.safetensors") for name in CONCEPTS}


def settled(base: Base, adapters: dict[str, Adapter], folder: Path) -> dict[str, Adapter]:
    """Return `adapters` taught their sum, from `folder` where that was done before."""
    files = {name: folder / f"{name}.safetensors" for name in adapters}
    if not all(file.exists() for file in files.values()):
        results = settle(base, list(adapters.values()), checkpoint=folder / "checkpoint")
        for file, result in zip(files.values(), results, strict=True):
            save_adapter(result.adapter, file)
    return {name: load_adapter(file) for name, file in files.items()}


def sketch(concepts: Sequence[Concept], number: int, side: int) -> Image.Image:
    """Return white lines on black, `side` pixels wide: the outlines of `concepts` from left to right, from the n-th photos."""
    things = Image.new("L", (side, side), 0)
    for place, concept in enumerate(concepts, start=1):
        mask = concept.examples[number % len(concept.examples)].mask
        thing = mask.crop(mask.getbbox())
        slot = side / len(concepts)
        scale = min(SKETCHED_HEIGHTS[len(concepts)] * side / thing.height, slot / thing.width)
        form = thing.resize((round(thing.width * scale), round(thing.height * scale)), Image.Resampling.BOX)
        corner = (round((place - 0.5) * slot - form.width / 2), round(GROUND * side - form.height))
        things.paste(place, corner, form.point(lambda value: 255 * (value > 127)))
    return Image.fromarray(255 * silhouettes(np.asarray(things)).astype(np.uint8))


def draw(
    base: Base, adapters: dict[str, Adapter], names: tuple[str, ...], way: str, method: str, numbers: range, folder: Path
) -> None:
    """Draw what is missing of the pictures `numbers` of `names` into `folder`."""
    pair, concepts = None, [load_concept(SAMPLES_FOLDER / name) for name in names]
    for turn, number in enumerate(numbers):
        file = folder / f"{number:03d}.png"
        if file.exists():
            continue
        pair = pair or fuse([adapters[name] for name in names], method=method, allow_overlap=True)
        prompt = f"{listed(pair.tokens)} {list(SCENES)[turn % len(SCENES)]}"
        regions = suggest_regions(prompt, pair.class_words) if WAYS[way]["regional"] else ()
        condition = Condition(image=sketch(concepts, number, base.resolution)) if WAYS[way]["sketched"] else None
        confined = WAYS[way]["confined"]
        drawing = Drawing(prompt=prompt, seed=1000 + number, regions=regions, confined=confined, condition=condition)
        (picture,) = generate(base, drawing, pair)
        save_picture(picture, file, "mini-sd")


def judged(judge: Judge, names: tuple[str, ...], files: Sequence[Path]) -> list[Judged]:
    """Return what the judge says of the pictures in `files`, on which `names` should stand from left to right."""
    images = [Image.open(file).convert("RGB") for file in files]
    found = []
    for image, sightings in zip(images, judge.look(images), strict=True):
        strongest = [_strongest(sightings, place, len(names)) for place in range(len(names))]
        confidences = [
            sighting.confidence if sighting and sighting.character == name else 0.0
            for sighting, name in zip(strongest, names, strict=True)
        ]
        seen = tuple(sighting.character if sighting else "nothing" for sighting in strongest)
        found.append(Judged(image=image, seen=seen, confidences=tuple(confidences)))
    return found


def _strongest(sightings: Sequence[Sighting], place: int, places: int) -> Sighting | None:
    return next((sighting for sighting in sightings if place <= sighting.x * places < place + 1), None)


def speed(base: Base, adapter: Adapter) -> dict[str, float]:
    """Return the processor seconds per drawing of the plain prompt and of a region for each concept, and their ratio."""
    prompt = f"{listed(adapter.tokens)} near a lake"
    plain = Drawing(prompt=prompt, count=8)
    ways = {"prompt": plain, "regions": replace(plain, regions=suggest_regions(prompt, adapter.class_words))}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _, (name, drawing) in product(range(SPEED_ROUNDS + 1), ways.items()):
        started = time.process_time()
        generate(base, drawing, adapter)
        times[name].append(time.process_time() - started)
    seconds = {name: median(values[1:]) for name, values in times.items()}  # the first round warms up
    return {name: round(value, 2) for name, value in seconds.items()} | {"ratio": seconds["regions"] / seconds["prompt"]}


def rows(joinings: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield joining, group and way of every row, the most telling first."""
    for joining in joinings:
        yield from ((joining, group, way) for way, group in product(WAYS, GROUPS))


def main() -> None:
    """Measure row by row; the JSON and the sheet are written anew after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.composition", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--pictures", type=int, default=100, help="pictures per row (default: %(default)s)")
    parser.add_argument("--preset", default="balanced", help="how the concepts are trained (default: %(default)s)")
    parser.add_argument("--joinings", nargs="+", choices=JOININGS, help="which joinings are drawn (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("out/composition"), help="where adapters and pictures are kept")
    options = parser.parse_args()
    base, judge = load_base(), load_judge()
    joinings = options.joinings or list(JOININGS)
    result: dict[str, Any] = {"base": base.fingerprint, "preset": options.preset, "pictures": options.pictures, "rows": []}
    sheet: list[Row] = []
    for joining, group, way in rows(joinings):
        form, together, method = JOININGS[joining]
        own = training_settings(base, options.preset, form, together)
        kept = options.folder / digest([base.fingerprint, asdict(own), together])
        adapters = trained(base, together, own, kept / "adapters")
        if method == "settled":
            adapters, method = settled(base, adapters, kept / method), "sum"
            kept /= "settled"
        pictures: list[Judged] = []
        for turn, names in enumerate(GROUPS[group]):
            folder = kept / f"{method}-{way}" / "+".join(names)
            numbers = range(turn, options.pictures, len(GROUPS[group]))
            draw(base, adapters, names, way, method, numbers, folder)
            pictures += judged(judge, names, [folder / f"{number:03d}.png" for number in numbers])
        result["rows"].append(_row(joining, group, way, pictures))
        sheet.append(_shown(result["rows"][-1], pictures))
        if "speed" not in result:
            result["speed"] = speed(base, fuse([adapters[name] for name in GROUPS["three"][0]]))
        text = json.dumps(result, indent=2)
        write_atomically(options.json, lambda path, text=text: path.write_text(text, encoding="utf-8"))
        contact_sheet(sheet).save(options.json.with_suffix(".jpg"), quality=92)
        print(json.dumps(result["rows"][-1]), flush=True)


def _row(joining: str, group: str, way: str, pictures: Sequence[Judged]) -> dict[str, Any]:
    return {
        "joining": joining,
        "group": group,
        "way": way,
        "right": mean(float(picture.right) for picture in pictures),
        "concepts": mean(float(confidence > 0) for picture in pictures for confidence in picture.confidences),
    }


def _shown(row: dict[str, Any], pictures: Sequence[Judged]) -> Row:
    """Return the best and the worst pictures of a row."""
    ranked = sorted(pictures, key=lambda picture: (min(picture.confidences), mean(picture.confidences)), reverse=True)
    half = min(SHOWN, len(ranked) // 2)
    cells = tuple(Cell(image=picture.image, lines=(", ".join(picture.seen)[:28],)) for picture in ranked[:half] + ranked[-half:])
    return Row(label=f"{row['group']}\n{row['joining']}, {row['way']}\n{row['right']:.2f} right\nbest, then worst", cells=cells)


if __name__ == "__main__":
    main()
