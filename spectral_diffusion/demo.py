"""The main job on the embedded base, start to end: photos, training, fusing, drawing, scoring, export, one report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.adapter_file import save_adapter
from spectral_diffusion.adapters.band_plan import fewest_directions
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base, load_base
from spectral_diffusion.concepts.concept import SAMPLES_FOLDER, Concept, load_concept
from spectral_diffusion.errors import InputError
from spectral_diffusion.export import export_kohya
from spectral_diffusion.files import write_atomically
from spectral_diffusion.generation.drawing import Drawing, Picture
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.generation.picture_file import save_picture
from spectral_diffusion.generation.regions import suggest_regions
from spectral_diffusion.prompts.tokens import expand_prompt
from spectral_diffusion.reports.contact_sheet import Cell, Row, contact_sheet
from spectral_diffusion.reports.exactness import export_error, fusion_error
from spectral_diffusion.scoring.clip_scorer import ClipScorer, load_scorer
from spectral_diffusion.spectra.bands import Band, next_free_band
from spectral_diffusion.toyworld.judge import Judge, load_judge
from spectral_diffusion.training import TrainingProgress, TrainingSettings, preset, train_together

DEMO_CONCEPTS = ("poodle", "black-cat")
PROMPTS = (
    "{} near a lake",
    "a photo of {} in the snow",
    "{} on the beach",
    "{} in the city",
    "a picture of {} in the forest",
)
TOGETHER = "{} and {} near a lake"
PICTURES_PER_PROMPT = 4
PICTURES_TOGETHER = 20
FUSED, REPORT, CHECKPOINT = "fused", "report.json", "training.checkpoint"


@dataclass(frozen=True, kw_only=True)
class JudgedPicture:
    """A drawn picture, its scores, and the characters that the judge saw, most confident first."""

    picture: Picture
    clip_text: float
    clip_image: float
    seen: tuple[str, ...]


class Assessor:
    """Draws the fixed prompts and has the pictures scored and judged."""

    def __init__(
        self,
        base: Base,
        concepts: dict[str, Concept],
        scorer: ClipScorer,
        judge: Judge,
        on_picture: Callable[[Picture], None] = lambda picture: None,
    ):
        self.base, self.concepts, self.scorer, self.judge = base, concepts, scorer, judge
        self.on_picture = on_picture

    def alone(self, adapter: Adapter, token: str, *, whole: bool, per_prompt: int = PICTURES_PER_PROMPT) -> list[JudgedPicture]:
        """Draw every prompt of `PROMPTS` with `token`."""
        pictures: list[Picture] = []
        for number, prompt in enumerate(PROMPTS):
            drawing = Drawing(prompt=prompt.format(token), count=per_prompt, seed=1000 * number)
            pictures += generate(self.base, drawing, adapter, whole=whole, on_picture=self.on_picture)
        return self.assess(pictures, [token])

    def together(self, adapter: Adapter, tokens: Sequence[str], *, in_regions: bool) -> list[JudgedPicture]:
        """Draw `TOGETHER` with both tokens, by the prompt alone or each in its own half of the picture."""
        prompt = TOGETHER.format(*tokens)
        regions = suggest_regions(prompt, adapter.class_words) if in_regions else ()
        drawing = Drawing(prompt=prompt, count=PICTURES_TOGETHER, seed=77_000, regions=regions)
        return self.assess(generate(self.base, drawing, adapter, on_picture=self.on_picture), tokens)

    def assess(self, pictures: Sequence[Picture], tokens: Sequence[str]) -> list[JudgedPicture]:
        """Score `pictures` against their prompts and the photos of `tokens`, and have them judged."""
        images = [picture.image for picture in pictures]
        class_words = {token: concept.class_word for token, concept in self.concepts.items()}
        texts = self.scorer.text_alignment(images, [expand_prompt(picture.drawing.prompt, class_words) for picture in pictures])
        references = [example.photo.image for token in tokens for example in self.concepts[token].examples]
        alignments = self.scorer.image_alignment(images, references)
        sightings = self.judge.look(images)
        return [
            JudgedPicture(picture=picture, clip_text=text, clip_image=alignment, seen=tuple(s.character for s in seen))
            for picture, text, alignment, seen in zip(pictures, texts, alignments, sightings, strict=True)
        ]


def share_right(pictures: Sequence[JudgedPicture], character: str) -> float:
    """Return the share of pictures in which the judge's first answer is `character`."""
    return mean(float(picture.seen[:1] == (character,)) for picture in pictures)


def share_both(pictures: Sequence[JudgedPicture], characters: Sequence[str]) -> float:
    """Return the share of pictures whose strongest places, as many as `characters`, show exactly these."""
    return mean(float(set(picture.seen[: len(characters)]) == set(characters)) for picture in pictures)


def run_demo(
    out: Path,
    *,
    names: Sequence[str] = DEMO_CONCEPTS,
    settings: TrainingSettings | None = None,
    on_line: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
    on_drawn: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Run the main job and leave adapters, pictures, contact sheet, exported file and `report.json` in `out`.

    Args:
        names: folders below `concepts/`, one sample concept each.
        settings: how to train; the preset `balanced` when missing.
        on_line: called with a line for the user at each stage.
        on_progress: called after every training step.
        on_drawn: called after every picture with the number of pictures drawn and to be drawn.

    Returns:
        What stands in `report.json`.

    Raises:
        InputError: an adapter that it would overwrite stands in `out` and was not made by it.
    """
    made_here = any((out / name).exists() for name in (REPORT, CHECKPOINT))
    foreign = [out / f"{name}.safetensors" for name in (*names, FUSED) if (out / f"{name}.safetensors").exists()]
    if foreign and not made_here:
        raise InputError(f"'{foreign[0]}' was not made by the demo and would be overwritten; choose another folder.")
    started = time.monotonic()
    base = load_base()
    settings = settings or preset("balanced", base, concepts=len(names))
    concepts = {concept.token: concept for concept in (load_concept(SAMPLES_FOLDER / name) for name in names)}
    characters = dict(zip(concepts, names, strict=True))
    trained, training_seconds = _train_all(base, concepts, settings, out, on_line, on_progress)
    fused = fuse(list(trained.values()))
    save_adapter(fused, out / f"{FUSED}.safetensors")
    export = export_kohya(fused, out / "export" / "fused-lora.safetensors", overwrite=True)
    on_line("Drawing and judging ...")
    drawing_started = time.monotonic()
    drawn, total = count(1), 3 * len(trained) * len(PROMPTS) * PICTURES_PER_PROMPT + 2 * PICTURES_TOGETHER
    assessor = Assessor(base, concepts, load_scorer(), load_judge(), lambda picture: on_drawn(next(drawn), total))
    alone = {token: assessor.alone(adapter, token, whole=True) for token, adapter in trained.items()}
    whole = {token: assessor.alone(fused, token, whole=True) for token in trained}
    named = {token: assessor.alone(fused, token, whole=False) for token in trained}
    together = {
        "together": assessor.together(fused, list(concepts), in_regions=False),
        "in_regions": assessor.together(fused, list(concepts), in_regions=True),
    }
    drawing_seconds = time.monotonic() - drawing_started
    _save_pictures(out / "pictures", {"alone": alone, "fused": whole}, together)
    _sheet(concepts, alone, whole, together).save(out / "contact_sheet.png")
    report = {
        "concepts": characters,
        "method": fused.method,
        "identity": {
            kind: {token: share_right(pictures, characters[token]) for token, pictures in group.items()}
            for kind, group in (("alone", alone), ("fused", whole), ("fused_named", named))
        },
        "joint": share_both(together["together"], list(characters.values())),
        "joint_in_regions": share_both(together["in_regions"], list(characters.values())),
        "pictures": {"alone": len(PROMPTS) * PICTURES_PER_PROMPT, "together": PICTURES_TOGETHER},
        "clip_text": {kind: _by_prompt(group, "clip_text") for kind, group in (("alone", alone), ("fused", whole))},
        "clip_image": {kind: _by_prompt(group, "clip_image") for kind, group in (("alone", alone), ("fused", whole))},
        "together": {
            kind: {score: mean(getattr(judged, score) for judged in pictures) for score in ("clip_text", "clip_image")}
            for kind, pictures in together.items()
        },
        "seconds": {
            "training": training_seconds,
            "drawing_and_judging": round(drawing_seconds, 1),
            "all": round(time.monotonic() - started, 1),
        },
        "parameters": {token: adapter.concepts[0].parameters() for token, adapter in trained.items()},
        "file_bytes": {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*.safetensors"))},
        "exactness": {
            "fusion": fusion_error(base, fused),
            "export": export_error(base, fused, export.path),
        },
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    write_atomically(out / REPORT, lambda path: path.write_text(text, encoding="utf-8"))
    (out / CHECKPOINT).unlink(missing_ok=True)
    for line in _table(report):
        on_line(line)
    return report


def _train_all(
    base: Base,
    concepts: dict[str, Concept],
    settings: TrainingSettings,
    out: Path,
    on_line: Callable[[str], None],
    on_progress: Callable[[TrainingProgress], None],
) -> tuple[dict[str, Adapter], float]:
    directions = fewest_directions(base, settings.layers)
    bands: list[Band] = []
    for token, concept in concepts.items():
        bands.append(next_free_band(bands, settings.rank, directions, weakest_first=settings.weakest_first))
        on_line(f"Training {token} ({concept.class_word}) on singular directions {bands[-1]} ...")
    together = list(zip(concepts.values(), bands, strict=True))
    results = train_together(base, together, settings, checkpoint=out / CHECKPOINT, on_progress=on_progress)
    for concept, result in zip(concepts.values(), results, strict=True):
        save_adapter(result.adapter, out / f"{concept.source.name}.safetensors")
    trained = {token: result.adapter for token, result in zip(concepts, results, strict=True)}
    return trained, round(results[0].seconds, 1)


def _by_prompt(group: dict[str, list[JudgedPicture]], score: str) -> dict[str, float]:
    prompts: dict[str, list[float]] = {}
    for pictures in group.values():
        for judged in pictures:
            prompts.setdefault(judged.picture.drawing.prompt, []).append(getattr(judged, score))
    return {prompt: round(mean(values), 4) for prompt, values in prompts.items()}


def _save_pictures(
    folder: Path, groups: dict[str, dict[str, list[JudgedPicture]]], together: dict[str, list[JudgedPicture]]
) -> None:
    for kind, group in groups.items():
        for number, pictures in enumerate(group.values()):
            for index, judged in enumerate(pictures):
                save_picture(judged.picture, folder / f"{kind}-{number + 1}-{index:02d}.png", "mini-sd")
    for kind, pictures in together.items():
        for index, judged in enumerate(pictures):
            save_picture(judged.picture, folder / f"{kind}-{index:02d}.png", "mini-sd")


def _sheet(
    concepts: dict[str, Concept],
    alone: dict[str, list[JudgedPicture]],
    whole: dict[str, list[JudgedPicture]],
    together: dict[str, list[JudgedPicture]],
) -> Image.Image:
    rows = []
    for token, concept in concepts.items():
        photos = tuple(Cell(image=example.photo.image) for example in concept.examples[: len(PROMPTS)])
        rows.append(Row(label=f"{token}\nphotos", cells=photos))
        rows.append(Row(label=f"{token}\nalone", cells=_cells(alone[token][::PICTURES_PER_PROMPT])))
        rows.append(Row(label=f"{token}\nafter fusing", cells=_cells(whole[token][::PICTURES_PER_PROMPT])))
    for label, pictures in (
        ("both, by the\nprompt alone", together["together"]),
        ("both, each in\nits half", together["in_regions"]),
    ):
        rows.append(Row(label=label, cells=_cells(pictures[: len(PROMPTS)])))
    return contact_sheet(rows)


def _cells(pictures: Sequence[JudgedPicture]) -> tuple[Cell, ...]:
    return tuple(
        Cell(
            image=judged.picture.image,
            lines=(
                judged.picture.drawing.prompt[:26],
                f"text {judged.clip_text:.2f}  image {judged.clip_image:.2f}",
                "judge: " + ", ".join(judged.seen[: max(1, len(judged.picture.tokens))])[:26],
            ),
        )
        for judged in pictures
    )


def _table(report: dict[str, Any]) -> list[str]:
    lines = ["", f"{'concept':<16}{'alone':>8}{'fused':>8}{'named':>8}   share of pictures with the right identity"]
    identity = report["identity"]
    for token in identity["alone"]:
        shares = "".join(f"{identity[kind][token]:>8.2f}" for kind in ("alone", "fused", "fused_named"))
        lines.append(f"{token:<16}{shares}")
    lines.append(
        f"both in one picture: {report['joint']:.2f} by the prompt alone, {report['joint_in_regions']:.2f} each in its half"
    )
    exactness = report["exactness"]
    lines.append(f"largest relative error: fusing {exactness['fusion']:.1e}, export {exactness['export']:.1e}")
    return lines
