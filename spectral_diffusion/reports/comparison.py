"""X/Y comparisons: one picture per pair of values, as one labelled picture and a table of scores."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.bases.base import Base
from spectral_diffusion.errors import InputError
from spectral_diffusion.files import write_atomically
from spectral_diffusion.generation.album import Album
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.prompts.tokens import marked_words
from spectral_diffusion.reports.axis import MOST_PICTURES, Axis
from spectral_diffusion.reports.contact_sheet import Cell, Row, contact_sheet
from spectral_diffusion.scoring.clip_scorer import ClipScorer
from spectral_diffusion.scoring.score import PictureScore, check_can_be_scored, score_pictures
from spectral_diffusion.toyworld.judge import Judge

_logger = logging.getLogger(__name__)

_OF_ADAPTERS = ("strength", "method")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The scored pictures of a comparison, row by row as `x` and `y` go."""

    x: Axis
    y: Axis
    scores: tuple[PictureScore, ...]
    images: tuple[Image.Image, ...]

    def sheet(self) -> Image.Image:
        """Return all pictures as one, with labels and scores."""
        wide = len(self.x.values)
        cells = [
            Cell(image=image, lines=(f"{self.x.name} {self.x.values[index % wide]}"[:28], *_score_lines(score)))
            for index, (image, score) in enumerate(zip(self.images, self.scores, strict=True))
        ]
        rows = [
            Row(label=_wrapped(f"{self.y.name} {value}"), cells=tuple(cells[row * wide : (row + 1) * wide]))
            for row, value in enumerate(self.y.values)
        ]
        return contact_sheet(rows)

    def table(self) -> str:
        """Return the scores as CSV with a header."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        tokens = list(self.scores[0].clip_image)
        x_name, y_name = (self.x.name, self.y.name) if self.x.name != self.y.name else (self.x.name, f"{self.y.name} (row)")
        writer.writerow([y_name, x_name, "picture", "clip_text", *(f"clip_image {token}" for token in tokens), "judged"])
        for index, score in enumerate(self.scores):
            row, column = divmod(index, len(self.x.values))
            seen = " ".join(sighting.character for sighting in (score.judged or ())[:2])
            place = [self.y.values[row], self.x.values[column], Path(score.path).name]
            images = [f"{value:.4f}" for value in score.clip_image.values()]
            writer.writerow([*place, "" if score.clip_text is None else f"{score.clip_text:.4f}", *images, seen])
        return text.getvalue()


def write_comparison(comparison: Comparison, sheet: Path) -> None:
    """Write the labelled pictures as PNG to `sheet`, and the scores as CSV beside it.

    Raises:
        StorageError: a file could not be written.
    """
    image, table = comparison.sheet(), comparison.table()
    write_atomically(sheet, lambda path: image.save(path, "PNG"))
    write_atomically(sheet.with_suffix(".csv"), lambda path: path.write_text(table, encoding="utf-8"))


def compare(
    base: Base,
    drawing: Drawing,
    adapters: Mapping[str, Adapter | None],
    x: Axis,
    y: Axis,
    album: Album,
    scorer: ClipScorer,
    judge: Judge | None = None,
    *,
    references: Mapping[str, Path],
    on_picture: Callable[[Path], None] = lambda path: None,
) -> Comparison:
    """Draw one picture for every pair of values and score them all.

    Args:
        drawing: what stays the same.
        adapters: adapters by name, of which the first draws where no axis names one; None is the bare base.
        album: where the pictures are kept.
        references: token to the folder with that concept's photos.
        on_picture: called with each picture's file.

    Raises:
        InputError: there are too many pairs, an axis counts for nothing or names an adapter that is not there, or a prompt a
            token that has no class word.
        PhotoError: a folder of references has no usable photo.
    """
    if len(x.values) * len(y.values) > MOST_PICTURES:
        raise InputError(f"{len(x.values)} x {len(y.values)} pictures are too many; at most {MOST_PICTURES} are drawn.")
    if x.name == y.name:
        raise InputError(f"Both axes are '{x.name}', so one of them would count for nothing; let another thing differ.")
    choices = [_choose(drawing, adapters, {y.name: below, x.name: beside}) for below in y.values for beside in x.values]
    without = next((axis.name for axis in (x, y) if axis.name in _OF_ADAPTERS), None)
    if without and not any(adapter for _, adapter in choices):
        raise InputError(f"The bare base has no {without}, so all its pictures would be the same; give an adapter.")
    class_words = {token: word for adapter in adapters.values() if adapter for token, word in adapter.class_words.items()}
    prompts = list(dict.fromkeys(chosen.prompt for chosen, _ in choices))
    check_can_be_scored(prompts, references, class_words)
    if unknown := list(dict.fromkeys(word for prompt in prompts for word in marked_words(prompt, class_words))):
        _logger.warning("No adapter has %s; it is read as plain letters.", ", ".join(unknown))
    paths, images = [], []
    for chosen, adapter in choices:
        (picture,) = generate(base, chosen, adapter)
        paths.append(album.add(picture))
        images.append(picture.image)
        on_picture(paths[-1])
    report = score_pictures(paths, references, scorer, judge, class_words=class_words)
    return Comparison(x=x, y=y, scores=report.pictures, images=tuple(images))


def _choose(
    drawing: Drawing, adapters: Mapping[str, Adapter | None], values: Mapping[str, object]
) -> tuple[Drawing, Adapter | None]:
    """Return the drawing and the adapter of one pair of values."""
    name = values.get("adapter", next(iter(adapters)))
    if name not in adapters:
        raise InputError(f"There is no adapter '{name}' to compare; choose one of {', '.join(adapters)}.")
    adapter = adapters[str(name)]
    fields = {"sampler": "scheduler"}
    changes = {fields.get(key, key): value for key, value in values.items() if key not in ("adapter", *_OF_ADAPTERS)}
    if adapter is not None and "strength" in values:
        adapter = adapter.scaled(float(str(values["strength"])))
    if adapter is not None and "method" in values:
        adapter = replace(adapter, method=str(values["method"]))
    return replace(drawing, **changes, count=1), adapter


def _score_lines(score: PictureScore) -> tuple[str, ...]:
    text = "-" if score.clip_text is None else f"{score.clip_text:.2f}"
    return (f"text {text}", *(f"{token[:20]} {value:.2f}" for token, value in list(score.clip_image.items())[:2]))


def _wrapped(text: str, width: int = 20) -> str:
    """Return `text` on lines of `width` letters, five at most."""
    return "\n".join([text[start : start + width] for start in range(0, len(text), width)][:5])
