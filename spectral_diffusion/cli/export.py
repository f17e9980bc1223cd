"""`spectral-diffusion export`: files that other tools read."""

from __future__ import annotations

import argparse
from pathlib import Path

from spectral_diffusion.cli.console import Console, quiet_libraries
from spectral_diffusion.cli.options import add_json_option, add_out_options
from spectral_diffusion.cli.outputs import check_output

SUMMARY = "write an adapter as a LoRA that AUTOMATIC1111, ComfyUI and diffusers read"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("adapter", type=Path, metavar="FILE", help="an adapter file")
    parser.add_argument("--format", choices=("kohya",), default="kohya", help="naming of the layers (default: %(default)s)")
    add_out_options(parser, "the LoRA; each token's embedding is written beside it")
    add_json_option(parser, "the names of the files and words")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Export, and say where the files go and what to type."""
    check_output(arguments.out, force=arguments.force, inputs=[arguments.adapter])
    quiet_libraries()
    from spectral_diffusion.adapter_file import load_adapter
    from spectral_diffusion.export import export_kohya, instructions

    adapter = load_adapter(arguments.adapter)
    export = export_kohya(adapter, arguments.out)
    for line in instructions(export, adapter.family):
        console.say(line)
    console.give(
        {
            "lora": str(export.lora),
            "description": str(export.description),
            "embeddings": {token: str(path) for token, path in export.embeddings.items()},
            "words": export.trigger_words,
            "rank": export.rank,
        }
    )
    return 0
