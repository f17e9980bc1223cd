"""`spectral-diffusion demo`: the main job from photos to scores, on the embedded base and two sample concepts."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from spectral_diffusion.cli.console import Console, open_libraries
from spectral_diffusion.cli.displays import CountDisplay, TrainingDisplay
from spectral_diffusion.cli.options import add_json_option
from spectral_diffusion.cli.outputs import check_writable

SUMMARY = "run the main job on the embedded base and two sample concepts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), metavar="FOLDER", help="where all files go (default: %(default)s)"
    )
    add_json_option(parser, "the report")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Run the demo."""
    check_writable(arguments.out)
    open_libraries()
    from spectral_diffusion.demo import run_demo

    with closing(TrainingDisplay()) as training, closing(CountDisplay("drawing", "picture")) as drawing:
        report = run_demo(arguments.out, on_line=console.say, on_progress=training.show, on_drawn=drawing.show)
    console.give(report)
    return 0
