"""`spectral-diffusion export`: files that other tools read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from spectral_diffusion.cli.console import Console, open_libraries
from spectral_diffusion.cli.options import add_base_options, add_json_option, pair_type, read_chosen_base, unique_pairs
from spectral_diffusion.errors import InputError

if TYPE_CHECKING:
    from spectral_diffusion.adapters.adapter import Adapter
    from spectral_diffusion.export import Export

SUMMARY = "write an adapter as files that AUTOMATIC1111, ComfyUI and diffusers read"

FORMATS = {
    "kohya": "a LoRA that all tools read",
    "diffusers": "a LoRA with the names of diffusers and PEFT",
    "embedding": "the tokens' embeddings only",
    "checkpoint": "the base with the adapter merged in",
}
"""What can be written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("adapter", type=Path, metavar="FILE", help="an adapter file")
    kinds = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    parser.add_argument("--format", choices=tuple(FORMATS), default="kohya", help=f"{kinds} (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="PATH",
        help="a .safetensors file, each token's embedding being written beside it; a folder for embeddings, or for a "
        "checkpoint in diffusers' layout",
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    parser.add_argument(
        "--strength",
        action="append",
        default=[],
        type=pair_type('"<V1>=0.8"'),
        metavar="TOKEN=X",
        help="factor on one concept's strength; give it once per concept (default: 1)",
    )
    parser.add_argument(
        "--precision", choices=("fp16", "bf16", "fp32"), default="fp16", help="of the numbers (default: %(default)s)"
    )
    parser.add_argument(
        "--rank", type=int, metavar="R", help="compress a LoRA to this rank and print the errors (default: exact)"
    )
    parser.add_argument("--preview", type=Path, metavar="PICTURE", help="shown for a kohya LoRA, written beside it as a .png")
    add_base_options(parser, "with --format checkpoint: the embedded base")
    add_json_option(parser, "the names of the files and words")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Export, and say where the files go and what to type."""
    _check_use(arguments)
    if arguments.format == "kohya":
        console.keep_off(arguments.out.with_suffix(".json"))  # what AUTOMATIC1111 reads beside it
    open_libraries()
    from spectral_diffusion.adapters.adapter_file import load_adapter
    from spectral_diffusion.export import places, remarks

    adapter = load_adapter(arguments.adapter).strengthened(_strengths(arguments))
    export = _export(adapter, arguments)
    for group, error in export.errors.items():
        console.say(f"relative error of rank {export.rank}, {group}: {error:.2e}")
    for line in (*places(export), *remarks(adapter)):
        console.say(line)
    console.give(
        {
            "format": export.format,
            "path": str(export.path),
            "side_files": [str(path) for path in export.side_files],
            "embeddings": {token: str(path) for token, path in export.embeddings.items()},
            "words": export.words,
            "rank": export.rank,
            "errors": export.errors,
        }
    )
    return 0


def _check_use(arguments: argparse.Namespace) -> None:
    out, format = arguments.out, arguments.format
    is_file = out.suffix.lower() == ".safetensors"
    if arguments.adapter.resolve() == out.resolve():
        raise InputError(f"'{out}' is read by this command and would be overwritten; choose another --out.")
    if format in ("kohya", "diffusers") and not is_file:
        raise InputError(f"'{out}' does not end in .safetensors; a {format} LoRA is one file.")
    if format == "embedding" and (is_file or out.is_file()):
        raise InputError(f"'{out}' is a file name; give a folder, each embedding is called as its token.")
    if format == "checkpoint" and not is_file and out.suffix:
        raise InputError(f"'{out}' is neither a .safetensors file nor a folder; choose another --out.")
    if arguments.rank is not None and format not in ("kohya", "diffusers"):
        raise InputError(f"--rank is for LoRAs; leave it out for --format {format}.")
    if arguments.preview is not None and format != "kohya":
        raise InputError(f"--preview is for kohya LoRAs; leave it out for --format {format}.")
    for option, given in (("--base", arguments.base), ("--prediction-type", arguments.prediction_type)):
        if given is not None and format != "checkpoint":
            raise InputError(f"{option} is for checkpoints, which it is merged into; leave it out for --format {format}.")


def _strengths(arguments: argparse.Namespace) -> dict[str, float]:
    try:
        return {token: float(value) for token, value in unique_pairs(arguments.strength, "--strength").items()}
    except ValueError as error:
        raise InputError(f'--strength needs a number after the token, such as "<V1>=0.8" ({error}).') from error


def _export(adapter: Adapter, arguments: argparse.Namespace) -> Export:
    from spectral_diffusion.export import PRECISIONS, export_checkpoint, export_diffusers, export_embeddings, export_kohya

    common = {"dtype": PRECISIONS[arguments.precision], "overwrite": arguments.force}
    if arguments.format == "kohya":
        return export_kohya(adapter, arguments.out, rank=arguments.rank, preview=arguments.preview, **common)
    if arguments.format == "diffusers":
        return export_diffusers(adapter, arguments.out, rank=arguments.rank, **common)
    if arguments.format == "checkpoint":
        return export_checkpoint(adapter, read_chosen_base(arguments), arguments.out, **common)
    return export_embeddings(adapter, arguments.out, **common)
