"""`spectral-diffusion export`: files that other tools read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from spectral_diffusion.cli.console import Console, quiet_libraries
from spectral_diffusion.cli.options import add_json_option, add_out_options
from spectral_diffusion.cli.outputs import check_output

if TYPE_CHECKING:
    from spectral_diffusion.export import Export

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
    from spectral_diffusion.export import export_kohya

    adapter = load_adapter(arguments.adapter)
    export = export_kohya(adapter, arguments.out)
    for line in _instructions(export, adapter.family):
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


def _instructions(export: Export, family: str) -> Iterator[str]:
    lora, words = export.lora.name, list(export.trigger_words.values())
    embeddings = ", ".join(path.name for path in export.embeddings.values())
    yield (
        f"AUTOMATIC1111: put {lora} and {export.description.name} into models/Lora, {embeddings} into embeddings; "
        f"type: <lora:{export.lora.stem}:1> {' and '.join(words)}"
    )
    yield (
        f"ComfyUI: put {lora} into models/loras, {embeddings} into models/embeddings; "
        f"load the LoRA and type: {' and '.join(f'embedding:{word}' for word in words)}"
    )
    if family == "mini":
        yield "This adapter belongs to the embedded base, which only diffusers loads."
