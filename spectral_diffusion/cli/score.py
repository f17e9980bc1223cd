"""`spectral-diffusion score`: measure how well pictures fit their prompts and the concepts' photos."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from spectral_diffusion.cli.console import Console, open_libraries
from spectral_diffusion.cli.options import (
    add_device_option,
    add_json_option,
    add_references_option,
    check_device,
    pair_type,
    unique_pairs,
)

if TYPE_CHECKING:
    from spectral_diffusion.scoring.score import PictureScore, ScoreReport

SUMMARY = "score pictures with CLIP, and toy-world characters with the judge"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURES", help="folders of pictures, or picture files")
    add_references_option(parser, "to measure how much the pictures look like it")
    parser.add_argument(
        "--class-word",
        action="append",
        type=pair_type('"<V1>=dog"'),
        default=[],
        metavar="TOKEN=WORD",
        help="what a token stands for, where a picture's own file does not say; repeatable",
    )
    parser.add_argument(
        "--clip",
        metavar="MODEL",
        help="a folder with a CLIP in open_clip's form, or NAME:WEIGHTS such as ViT-B-32:weights.safetensors "
        "(default: the embedded one, which knows the embedded base's toy world only)",
    )
    parser.add_argument("--judge", action="store_true", help="let the judge say which toy-world characters are there")
    add_device_option(parser, "cpu")
    add_json_option(parser, "the scores")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Score the pictures and show a table."""
    references = unique_pairs(arguments.references, "--references")
    class_words = unique_pairs(arguments.class_word, "--class-word")
    open_libraries()
    from spectral_diffusion.scoring.score import load_scorer, score_pictures
    from spectral_diffusion.toyworld.judge import load_judge

    check_device(arguments.device)
    device = arguments.device or "cpu"
    report = score_pictures(
        arguments.pictures,
        {token: Path(folder) for token, folder in references.items()},
        load_scorer(arguments.clip, device=device),
        load_judge(device=device) if arguments.judge else None,
        class_words=class_words,
    )
    for line in _table(report):
        console.say(line)
    console.give(report.to_json())
    return 0


def _table(report: ScoreReport) -> Iterator[str]:
    tokens = list(report.clip_image)
    yield f"cosines of CLIP {report.scorer}: to the prompt" + "".join(f", to the photos of {token}" for token in tokens)
    for picture in report.pictures:
        yield _row(picture.clip_text, [picture.clip_image[token] for token in tokens], _name(picture))
    yield _row(report.clip_text, [report.clip_image[token] for token in tokens], f"mean of {len(report.pictures)}")


def _row(text: float | None, images: list[float], name: str) -> str:
    return "  ".join(["   -  " if value is None else f"{value:6.3f}" for value in (text, *images)] + [name])


def _name(picture: PictureScore) -> str:
    seen = "" if picture.judged is None else f"  ({', '.join(sighting.character for sighting in picture.judged[:3])})"
    return f"{picture.path}{seen}"
