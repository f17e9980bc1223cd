"""`spectral-diffusion fuse`: several adapter files in, one out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_diffusion.cli.console import Console, open_libraries, stop_on_interrupt
from spectral_diffusion.cli.describe import adapter_data, adapter_lines
from spectral_diffusion.cli.displays import STOPPING, CountDisplay, TrainingDisplay, how_to_resume
from spectral_diffusion.cli.options import (
    add_base_options,
    add_device_option,
    add_json_option,
    add_out_options,
    add_references_option,
    check_device,
    html_file,
    load_chosen_base,
    unique_pairs,
)
from spectral_diffusion.cli.outputs import check_output
from spectral_diffusion.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from spectral_diffusion.adapters.adapter import Adapter
    from spectral_diffusion.scoring.clip_scorer import ClipScorer
    from spectral_diffusion.training import TrainingResult

SUMMARY = "join several adapters into one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from spectral_diffusion.joining import FUSERS
    from spectral_diffusion.training.settings import SETTLING_STEPS

    parser.add_argument("adapters", nargs="+", type=Path, metavar="ADAPTER", help="adapter files, each on its own band")
    add_out_options(parser, "the fused adapter")
    parser.add_argument(
        "--strength", nargs="+", type=float, metavar="X", help="one factor per adapter, in the same order (default: 1)"
    )
    parser.add_argument(
        "--method",
        choices=tuple(FUSERS),
        help="; ".join(f"{name}: {fuser.help}" for name, fuser in FUSERS.items())
        + " (default: sum for concepts trained among one another, aligned for others)",
    )
    parser.add_argument("--allow-overlap", action="store_true", help="accept adapters trained on overlapping bands")
    parser.add_argument(
        "--settle",
        type=_steps,
        nargs="?",
        const=SETTLING_STEPS,
        metavar="STEPS",
        help="for concepts trained apart: first teach their sum, on the base and without photos, to give what each gave alone "
        "(a short training, %(const)d steps unless given)",
    )
    add_json_option(parser, "what was made")
    group = parser.add_argument_group("report", "What the fusion kept: every concept drawn alone and fused, on the base.")
    group.add_argument("--report", type=html_file, metavar="FILE", help="write this page, and its figures as .json beside it")
    add_references_option(group, "to compare with (default: its own pictures alone)")
    group.add_argument("--clip", metavar="MODEL", help="a CLIP, as for 'score' (default: the embedded one)")
    add_base_options(parser)
    add_device_option(parser)


def _steps(text: str) -> int:
    """Return the number of steps; what follows `--settle` may be meant as an adapter."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no number of steps; write --settle behind the adapters")
    return int(text)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Fuse, save, and say what was made."""
    check_output(arguments.out, force=arguments.force, inputs=arguments.adapters)
    _check_use(arguments, console)
    from spectral_diffusion.adapters.adapter_file import load_adapter, save_adapter
    from spectral_diffusion.adapters.fusion import fuse, trained_apart
    from spectral_diffusion.training import can_settle

    adapters = [load_adapter(path) for path in arguments.adapters]
    tokens = [token for adapter in adapters for token in adapter.tokens]
    compared_with = _compared_with(arguments, tokens) if arguments.report is not None else None
    checkpoint = arguments.out.with_name(f"{arguments.out.name}.checkpoint")
    join = partial(fuse, strengths=arguments.strength, allow_overlap=arguments.allow_overlap)
    if arguments.settle is not None:
        join(adapters, method=arguments.method or "sum")  # what cannot be fused is refused before it is settled
        results = _settle(arguments, adapters, checkpoint)
        if not results[0].finished:
            return how_to_resume(results[0].steps_done, arguments.settle, checkpoint)
        adapters = [result.adapter for result in results]
    fused = join(adapters, method=arguments.method)
    save_adapter(fused, arguments.out)
    if arguments.settle is not None:
        checkpoint.unlink(missing_ok=True)
    data = adapter_data(fused, arguments.out)
    for line in adapter_lines(data):
        console.say(line)
    if trained_apart(fused.concepts):
        remedy = "; --settle teaches it back, without photos" if can_settle(adapters) else ""
        console.say(f"  These were trained apart and lose identity in one adapter{remedy}.")
    if compared_with is not None:
        data["report"] = _report(arguments, fused, *compared_with, console)
    console.give(data)
    return 0


def _check_use(arguments: argparse.Namespace, console: Console) -> None:
    if arguments.report is not None:
        for path in (arguments.report, arguments.report.with_suffix(".json")):
            check_output(path, force=arguments.force, inputs=[*arguments.adapters, arguments.out], option="--report")
            console.keep_off(path)
        return
    for option, given in (("--references", arguments.references), ("--clip", arguments.clip)):
        if given:
            raise InputError(f"{option} is for the report; give --report too, or leave it out.")
    if arguments.base is not None and arguments.settle is None:
        raise InputError("--base is for --report and --settle, which draw on it; leave it out.")


def _compared_with(arguments: argparse.Namespace, tokens: Sequence[str]) -> tuple[ClipScorer, dict[str, list[Image.Image]]]:
    """Return what the report is made with, the CLIP and photos by token, before anything takes long."""
    open_libraries()
    from spectral_diffusion.concepts.photos import read_photos, require_photos
    from spectral_diffusion.scoring.clip_scorer import load_scorer

    check_device(arguments.device)
    folders = {token: Path(folder) for token, folder in unique_pairs(arguments.references, "--references").items()}
    unknown = folders.keys() - set(tokens)
    if unknown:
        raise InputError(f"--references names '{min(unknown)}', which none of the adapters has; they have {', '.join(tokens)}.")
    photos = {token: [photo.image for photo in require_photos(read_photos(folder), folder)] for token, folder in folders.items()}
    return load_scorer(arguments.clip, device=arguments.device or "cpu"), photos


def _settle(arguments: argparse.Namespace, adapters: list[Adapter], checkpoint: Path) -> list[TrainingResult]:
    """Settle the adapters with a progress bar until the end or Ctrl-C."""
    open_libraries()
    from spectral_diffusion.training import settle

    base = load_chosen_base(arguments)
    with stop_on_interrupt(STOPPING) as should_stop, closing(TrainingDisplay()) as display:
        return settle(
            base, adapters, steps=arguments.settle, checkpoint=checkpoint, on_progress=display.show, should_stop=should_stop
        )


def _report(
    arguments: argparse.Namespace,
    fused: Adapter,
    scorer: ClipScorer,
    photos: dict[str, list[Image.Image]],
    console: Console,
) -> dict[str, Any]:
    """Write the report, say the verdicts, and return its figures."""
    from spectral_diffusion.reports.fusion_report import report_fusion, save_report

    base = load_chosen_base(arguments)
    with closing(CountDisplay("report", "picture")) as display:
        report = report_fusion(base, fused, scorer, photos, on_picture=display.show)
    save_report(report, arguments.report)
    for concept in report.concepts:
        console.say(f"  {concept.verdict}")
    console.say(f"  report      {arguments.report}")
    return report.to_json()
