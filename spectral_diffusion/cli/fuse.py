"""`spectral-diffusion fuse`: several adapter files in, one out."""

from __future__ import annotations

import argparse
from pathlib import Path

from spectral_diffusion.cli.console import Console, quiet_libraries
from spectral_diffusion.cli.describe import adapter_data, adapter_lines
from spectral_diffusion.cli.options import add_json_option, add_out_options
from spectral_diffusion.cli.outputs import check_output

SUMMARY = "join several adapters into one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from spectral_diffusion.fusion import DEFAULT_METHOD
    from spectral_diffusion.joining import FUSERS

    parser.add_argument("adapters", nargs="+", type=Path, metavar="ADAPTER", help="adapter files, each on its own band")
    add_out_options(parser, "the fused adapter")
    parser.add_argument(
        "--strength", nargs="+", type=float, metavar="X", help="one factor per adapter, in the same order (default: 1)"
    )
    parser.add_argument(
        "--method",
        choices=tuple(FUSERS),
        default=DEFAULT_METHOD,
        help="; ".join(f"{name}: {fuser.help}" for name, fuser in FUSERS.items()) + " (default: %(default)s)",
    )
    parser.add_argument("--allow-overlap", action="store_true", help="accept adapters trained on overlapping bands")
    add_json_option(parser, "what was made")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Fuse, save, and say what was made."""
    check_output(arguments.out, force=arguments.force, inputs=arguments.adapters)
    quiet_libraries()
    from spectral_diffusion.adapter_file import load_adapter, save_adapter
    from spectral_diffusion.fusion import fuse

    fused = fuse(
        [load_adapter(path) for path in arguments.adapters],
        strengths=arguments.strength,
        method=arguments.method,
        allow_overlap=arguments.allow_overlap,
    )
    save_adapter(fused, arguments.out)
    data = adapter_data(fused, arguments.out)
    for line in adapter_lines(data):
        console.say(line)
    console.give(data)
    return 0
