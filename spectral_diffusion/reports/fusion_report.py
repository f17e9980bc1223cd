"""What a fusion kept: each concept drawn alone and fused on the same seeds, scored, with a verdict in words, as one page."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from PIL import Image

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.band_map import band_map
from spectral_diffusion.bases.base import Base
from spectral_diffusion.errors import InputError
from spectral_diffusion.files import write_together
from spectral_diffusion.generation.drawing import Drawing, Picture
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.scoring.clip_scorer import ClipScorer

PROMPTS = ("a photo of {}", "{} near a lake", "{} in the snow", "{} in the city")
LEAST_LIKENESS = 0.02
"""A concept that alone is no nearer to itself than a plain thing of its class by this much was hardly learnt."""
_VERDICTS = ((0.95, "keeps its identity"), (0.8, "mostly keeps its identity"), (0.5, "is weakened"))


@dataclass(frozen=True, kw_only=True)
class ConceptReport:
    """One concept before and after.

    Attributes:
        alone, fused, plain: mean CLIP cosine to the concept's photos (to its pictures alone where no photos were given) of
            the concept drawn alone, drawn with the whole fused adapter, and of its class word on the bare base.
        text_alone, text_fused: mean CLIP cosine to the prompts with the class word.
        kept: `(fused - plain) / (alone - plain)`, the share of its likeness that is left; None when it was hardly learnt.
        verdict: a sentence.
        rows: the pictures, `alone`, `fused` and `plain`, in the order of the prompts.
    """

    token: str
    class_word: str
    alone: float
    fused: float
    plain: float
    text_alone: float
    text_fused: float
    kept: float | None
    verdict: str
    rows: dict[str, tuple[Image.Image, ...]]


@dataclass(frozen=True, kw_only=True)
class FusionReport:
    """The concepts of a fused adapter, its method, the prompts and seed of the pictures, and cross-talk as in `BandMap`."""

    method: str
    scorer: str
    prompts: tuple[str, ...]
    seed: int
    concepts: tuple[ConceptReport, ...]
    cross_talk: tuple[tuple[float | None, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report without its pictures as plain dictionaries, lists, numbers and strings."""
        concepts = [{name: value for name, value in vars(concept).items() if name != "rows"} for concept in self.concepts]
        return vars(self) | {"concepts": concepts}

    def page(self) -> str:
        """Return the report as one HTML page with its pictures inside."""
        parts = [
            f"<h1>{_text(' + '.join(c.token for c in self.concepts))}</h1><p>Joined by the method '{_text(self.method)}'.</p>"
        ]
        parts += [_concept_section(concept, self.prompts) for concept in self.concepts]
        parts.append(_cross_talk_section([concept.token for concept in self.concepts], self.cross_talk))
        parts.append(f"<p>Cosines of CLIP {_text(self.scorer)}; the same seeds in every row, from {self.seed} on.</p>")
        head = f'<meta charset="utf-8"><title>Fusion report</title><style>{_STYLE}</style>'
        return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def report_fusion(
    base: Base,
    fused: Adapter,
    scorer: ClipScorer,
    references: Mapping[str, Sequence[Image.Image]] | None = None,
    *,
    seed: int = 0,
    on_picture: Callable[[int, int], None] = lambda done, total: None,
) -> FusionReport:
    """Draw every concept of `fused` alone and with all others attached, and say what is left of it.

    Args:
        references: token to the concept's photos; where they are missing its own pictures alone stand for them.
        on_picture: called with the number of pictures drawn and to be drawn.

    Raises:
        AdapterError: the adapter does not fit the base.
        InputError: a token of `references` is not the adapter's.
    """
    unknown = next((token for token in references or {} if token not in fused.tokens), None)
    if unknown is not None:
        raise InputError(
            f"The references name '{unknown}', which the adapter does not have; its tokens are {', '.join(fused.tokens)}."
        )
    total, done = 3 * len(PROMPTS) * len(fused.concepts), 0

    def count(picture: Picture) -> None:
        nonlocal done
        done += 1
        on_picture(done, total)

    def draw(adapter: Adapter | None, word: str) -> list[Image.Image]:
        drawn = []
        for number, prompt in enumerate(PROMPTS):
            drawing = Drawing(prompt=prompt.format(word), seed=seed + number)
            drawn += generate(base, drawing, adapter, whole=True, on_picture=count)
        return [picture.image for picture in drawn]

    talk = band_map([fused]).cross_talk
    concepts = []
    for number, concept in enumerate(fused.concepts):
        rows = {
            "alone": draw(fused.only([concept.token]), concept.token),
            "fused": draw(fused, concept.token),
            "plain": draw(None, f"a {concept.class_word}"),
        }
        photos = (references or {}).get(concept.token)
        likeness = {name: _likeness(scorer, images, photos, rows["alone"]) for name, images in rows.items()}
        texts = [prompt.format(f"a {concept.class_word}") for prompt in PROMPTS]
        spread = likeness["alone"] - likeness["plain"]
        kept = (likeness["fused"] - likeness["plain"]) / spread if spread > LEAST_LIKENESS else None
        concepts.append(
            ConceptReport(
                token=concept.token,
                class_word=concept.class_word,
                **likeness,
                text_alone=_mean(scorer.text_alignment(rows["alone"], texts)),
                text_fused=_mean(scorer.text_alignment(rows["fused"], texts)),
                kept=kept,
                verdict=_verdict(concept.token, concept.class_word, kept, _loudest(fused.tokens, number, talk[number])),
                rows={name: tuple(images) for name, images in rows.items()},
            )
        )
    return FusionReport(
        method=fused.method, scorer=scorer.name, prompts=PROMPTS, seed=seed, concepts=tuple(concepts), cross_talk=talk
    )


def save_report(report: FusionReport, path: Path) -> Path:
    """Write the page to `path` and the figures beside it as JSON; return the path of the JSON.

    Raises:
        StorageError: they could not be written.
    """
    figures = json.dumps(report.to_json(), indent=2, ensure_ascii=False)
    data = path.with_suffix(".json")
    write_together(
        {
            path: lambda temporary: temporary.write_text(report.page(), encoding="utf-8"),
            data: lambda temporary: temporary.write_text(f"{figures}\n", encoding="utf-8"),
        }
    )
    return data


def _likeness(
    scorer: ClipScorer, images: Sequence[Image.Image], photos: Sequence[Image.Image] | None, alone: Sequence[Image.Image]
) -> float:
    """Return the mean cosine of `images` to the photos, or to the pictures alone of other prompts."""
    if photos:
        return _mean(scorer.image_alignment(images, photos))
    one, other = scorer.embed_images(images), scorer.embed_images(alone)
    return _mean([float(one[row] @ other[column]) for row, column in permutations(range(len(images)), 2)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _loudest(tokens: Sequence[str], own: int, answers: Sequence[float | None]) -> str:
    """Return the words that name the concept whose change answers most to the inputs of concept `own`."""
    others = [
        (answer, token) for index, (answer, token) in enumerate(zip(answers, tokens, strict=True)) if index != own and answer
    ]
    if not others:
        return ""
    answer, token = max(others)
    return f"; {token} answers most to its inputs ({answer:.0%} of its own answer, before joining)"


def _verdict(token: str, class_word: str, kept: float | None, loudest: str) -> str:
    if kept is None:
        return f"{token} was hardly learnt: alone it looks no more like itself than any {class_word} does; train it longer."
    words = next((words for least, words in _VERDICTS if kept >= least), "is lost")
    return f"{token} {words}: {max(0, min(kept, 1)):.0%} of its likeness alone is left{loudest}."


_SIDE = 320
"""Pixels of the longer side of a picture on the page, which shows it half as large."""
_STYLE = (
    ":root{color-scheme:light;background:#fff}"
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c1c22}"
    "img{width:100%;max-width:160px;border-radius:4px}td,th{padding:4px 10px;text-align:left;vertical-align:top}"
    "table{border-collapse:collapse}.verdict{font-weight:600}"
)


def _text(words: str) -> str:
    return html.escape(words)


def _concept_section(concept: ConceptReport, prompts: Sequence[str]) -> str:
    names = {"alone": "alone", "fused": "fused", "plain": f"any {concept.class_word}"}
    head = "".join(f"<th>{_text(prompt.format(concept.token))}</th>" for prompt in prompts)
    rows = "".join(
        f"<tr><th>{_text(names[name])}<br>likeness {getattr(concept, name):.3f}</th>{''.join(map(_cell, images))}</tr>"
        for name, images in concept.rows.items()
    )
    texts = f"Fit to the prompt: {concept.text_alone:.3f} alone, {concept.text_fused:.3f} fused."
    verdict = f'<p class="verdict">{_text(concept.verdict)}</p>'
    return f"<h2>{_text(concept.token)}</h2>{verdict}<p>{texts}</p><table><tr><th></th>{head}</tr>{rows}</table>"


def _cell(image: Image.Image) -> str:
    """Return a cell with `image` in it, made as small as a sharp screen shows it."""
    content, small = io.BytesIO(), image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    small.save(content, "WEBP", quality=90)
    return f'<td><img alt="" src="data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"></td>'


def _cross_talk_section(tokens: Sequence[str], talk: Sequence[Sequence[float | None]]) -> str:
    head = "".join(f"<th>{_text(token)}</th>" for token in tokens)
    rows = "".join(
        f"<tr><th>{_text(token)}</th>"
        + "".join(f"<td>{'not measured' if value is None else f'{value:.0%}'}</td>" for value in row)
        + "</tr>"
        for token, row in zip(tokens, talk, strict=True)
    )
    return (
        "<h2>Cross-talk</h2><p>How strongly a concept's change (column) answers to the inputs of another (row), before joining; "
        f"100 % is that one's own answer.</p><table><tr><th></th>{head}</tr>{rows}</table>"
    )
