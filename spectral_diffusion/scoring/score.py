"""Score finished pictures: with CLIP against their prompts and the concepts' photos, and with the judge."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from spectral_diffusion.concepts.photos import list_pictures, read_photo, read_photos, require_photos
from spectral_diffusion.errors import InputError, PhotoError
from spectral_diffusion.generation.picture_file import OWN_CHUNK
from spectral_diffusion.prompts.tokens import expand_prompt, tokens_in
from spectral_diffusion.prompts.weights import plain_words
from spectral_diffusion.scoring.clip_scorer import DEFAULT_CLIP, ClipScorer, load_scorer
from spectral_diffusion.stages import counted
from spectral_diffusion.toyworld.judge import Judge, Sighting

__all__ = [
    "DEFAULT_CLIP",
    "ClipScorer",
    "PictureScore",
    "ScoreReport",
    "load_scorer",
    "prompt_in",
    "score_pictures",
]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PictureScore:
    """The scores of one picture.

    Attributes:
        path: the picture's file.
        prompt: what it was drawn from, None when its file does not say.
        clip_text: cosine to the prompt's plain words with class words for tokens, None without a prompt.
        clip_image: token to mean cosine to that concept's photos.
        judged: what the judge saw, most confident first; None without a judge.
    """

    path: str
    prompt: str | None
    clip_text: float | None
    clip_image: dict[str, float]
    judged: tuple[Sighting, ...] | None


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """The scores of several pictures and their means.

    Attributes:
        scorer: name of the CLIP; figures of different CLIPs do not compare.
        pictures: one record per picture.
        clip_text: mean over the pictures that have a prompt, None when none has.
        clip_image: token to mean over all pictures.
        skipped: files that are not pictures, with the reason.
    """

    scorer: str
    pictures: tuple[PictureScore, ...]
    clip_text: float | None
    clip_image: dict[str, float]
    skipped: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain dictionaries, lists, numbers and strings."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    path: Path
    image: Image.Image
    prompt: str | None
    text: str | None


def score_pictures(
    pictures: Sequence[Path],
    references: Mapping[str, Path],
    scorer: ClipScorer,
    judge: Judge | None = None,
    *,
    class_words: Mapping[str, str] | None = None,
) -> ScoreReport:
    """Score drawn pictures.

    Args:
        pictures: picture files, or folders of them.
        references: token to the folder with that concept's photos; may be empty.
        scorer: the CLIP, see `load_scorer`.
        judge: tells which toy-world characters a picture shows; only of use for pictures of the embedded base.
        class_words: token to class word, for prompts that hold tokens; what a picture's own file says comes first.

    Raises:
        InputError: there is no usable picture, or a prompt holds a token without a class word.
        PhotoError: a folder of references has no usable photo.
    """
    drawn, skipped = _read_all(_expanded(pictures), list(references), class_words or {})
    images = [picture.image for picture in drawn]
    texts = _text_scores(scorer, drawn)
    against = {token: scorer.image_alignment(images, _reference_images(folder)) for token, folder in references.items()}
    sightings = judge.look(images) if judge is not None else [None] * len(images)
    scores = tuple(
        PictureScore(
            path=str(picture.path),
            prompt=picture.prompt,
            clip_text=texts[row],
            clip_image={token: cosines[row] for token, cosines in against.items()},
            judged=None if seen is None else tuple(seen),
        )
        for row, (picture, seen) in enumerate(zip(drawn, sightings, strict=True))
    )
    return ScoreReport(
        scorer=scorer.name,
        pictures=scores,
        clip_text=_mean([text for text in texts if text is not None]),
        clip_image={token: sum(cosines) / len(cosines) for token, cosines in against.items()},
        skipped=tuple(skipped),
    )


def prompt_in(parameters: str) -> str:
    """Return the prompt in a `parameters` text: all before the line with the negative prompt or the settings."""
    lines = []
    for line in parameters.splitlines():
        if line.startswith(("Negative prompt:", "Steps:")):
            break
        lines.append(line)
    return "\n".join(lines).strip()


def _expanded(paths: Sequence[Path]) -> list[Path]:
    return [file for path in paths for file in (list_pictures(path) if path.is_dir() else [path])]


def _read_all(paths: Sequence[Path], tokens: Sequence[str], class_words: Mapping[str, str]) -> tuple[list[_Drawn], list[str]]:
    drawn: list[_Drawn] = []
    skipped: list[str] = []
    for path in counted("reading", "picture", paths):
        try:
            drawn.append(_read(path, tokens, class_words))
        except PhotoError as error:
            skipped.append(str(error))
    listed = "".join(f"\n  {reason}" for reason in skipped)
    if not drawn:
        raise InputError(f"There is no picture to score; give PNG files that were drawn, or their folder.{listed}")
    if skipped:
        _logger.warning("%d of %d files were left out of the scores:%s", len(skipped), len(paths), listed)
    return drawn, skipped


def _read(path: Path, tokens: Sequence[str], class_words: Mapping[str, str]) -> _Drawn:
    image = read_photo(path).image
    chunks = _text_chunks(path)
    prompt = prompt_in(chunks["parameters"]) if "parameters" in chunks else None
    if not prompt:
        return _Drawn(path=path, image=image, prompt=None, text=None)
    known = {**class_words, **_own_class_words(path, chunks)}
    return _Drawn(path=path, image=image, prompt=prompt, text=_in_class_words(prompt, tokens, known, f"of '{path}'"))


def check_can_be_scored(prompts: Sequence[str], references: Mapping[str, Path], class_words: Mapping[str, str]) -> None:
    """Raise what `score_pictures` would raise of pictures that are still to be drawn from `prompts`."""
    for folder in references.values():
        _reference_images(folder)
    for prompt in prompts:
        _in_class_words(prompt, list(references), class_words, f"'{prompt}'")


def _in_class_words(prompt: str, tokens: Sequence[str], class_words: Mapping[str, str], which: str) -> str:
    """Return `prompt` in words that CLIP knows."""
    text = expand_prompt(plain_words(prompt, [*class_words, *tokens]), class_words)
    unknown = tokens_in(text, tokens)
    if unknown:
        raise InputError(
            f"The prompt {which} holds {', '.join(unknown)}, for which no class word is known; "
            f"give one, as in --class-word \"{unknown[0]}=dog\" of 'score', or leave its reference photos out."
        )
    return text


def _text_chunks(path: Path) -> dict[str, str]:
    """Return the text chunks of a PNG; other formats have none."""
    with Image.open(path) as opened:
        opened.load()
        chunks = getattr(opened, "text", {})
    return {key: str(value) for key, value in chunks.items()}


def _own_class_words(path: Path, chunks: Mapping[str, str]) -> dict[str, str]:
    if OWN_CHUNK not in chunks:
        return {}
    try:
        own = json.loads(chunks[OWN_CHUNK]).get("class_words", {})
        return {str(token): str(word) for token, word in own.items()}
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"The '{OWN_CHUNK}' text of '{path}' is damaged ({error}); draw the picture again or remove the text."
        ) from error


def _text_scores(scorer: ClipScorer, drawn: Sequence[_Drawn]) -> list[float | None]:
    rows = [row for row, picture in enumerate(drawn) if picture.text is not None]
    cosines = scorer.text_alignment([drawn[row].image for row in rows], [drawn[row].text or "" for row in rows])
    scores: list[float | None] = [None] * len(drawn)
    for row, cosine in zip(rows, cosines, strict=True):
        scores[row] = cosine
    return scores


def _reference_images(folder: Path) -> list[Image.Image]:
    return [photo.image for photo in require_photos(read_photos(folder), folder)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
