"""`spectral-diffusion import`: an ordinary LoRA in, an adapter out."""

from __future__ import annotations

import argparse
from pathlib import Path

from spectral_diffusion.cli.console import Console, open_libraries
from spectral_diffusion.cli.describe import adapter_data, adapter_lines
from spectral_diffusion.cli.options import add_base_options, add_json_option, add_out_options, read_chosen_base
from spectral_diffusion.cli.outputs import check_output

SUMMARY = "make an adapter of an ordinary LoRA, to fuse it beside others or export it again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("lora", type=Path, metavar="FILE", help="a LoRA of kohya, diffusers or PEFT")
    parser.add_argument("--token", required=True, metavar="TOKEN", help='the word that calls it in prompts, such as "<V1>"')
    parser.add_argument(
        "--class-word", required=True, metavar="WORD", help="what it is; without --embedding the token stands for these words"
    )
    parser.add_argument("--embedding", type=Path, metavar="FILE", help="the embedding that was trained with the LoRA")
    add_base_options(parser, "none, its family is told from the file")
    add_out_options(parser, "the adapter")
    add_json_option(parser, "what was made")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Import, save, and say what was made."""
    inputs = [path for path in (arguments.lora, arguments.embedding) if path is not None]
    check_output(arguments.out, force=arguments.force, inputs=inputs)
    open_libraries()
    from spectral_diffusion.adapters.adapter_file import save_adapter
    from spectral_diffusion.imports import import_lora

    adapter = import_lora(
        arguments.lora,
        token=arguments.token,
        class_word=arguments.class_word,
        embedding=arguments.embedding,
        base=read_chosen_base(arguments) if arguments.base is not None else None,
    )
    save_adapter(adapter, arguments.out)
    data = adapter_data(adapter, arguments.out)
    for line in adapter_lines(data):
        console.say(line)
    console.give(data)
    return 0
