"""`spectral-diffusion info`: what an adapter file holds, or how a picture was drawn."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_diffusion.cli.console import Console, open_libraries
from spectral_diffusion.cli.describe import adapter_data, adapter_lines
from spectral_diffusion.cli.options import add_base_options, add_json_option, read_chosen_base
from spectral_diffusion.errors import AdapterError

if TYPE_CHECKING:
    from spectral_diffusion.adapters.adapter import Adapter
    from spectral_diffusion.bases.base import Base

SUMMARY = "show what an adapter file holds, or how a picture was drawn"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("file", type=Path, metavar="FILE", help="an adapter file, or a PNG drawn here or in AUTOMATIC1111")
    add_base_options(parser, "none, it is compared with nothing")
    add_json_option(parser, "it")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Show the adapter, and how well it fits the base when one is given; of a picture, the settings of its drawing."""
    if arguments.file.suffix.lower() == ".png":
        return _show_picture(arguments.file, console)
    from spectral_diffusion.adapters.adapter_file import load_adapter
    from spectral_diffusion.adapters.band_map import band_map

    adapter = load_adapter(arguments.file)
    data = adapter_data(adapter, arguments.file) | {"band_map": band_map([adapter]).to_json()}
    lines = list(adapter_lines(data))
    if arguments.base is not None:
        open_libraries()
        data["base"] = _compare(adapter, read_chosen_base(arguments))
        lines += _verdict(data["base"])
    for line in lines:
        console.say(line)
    console.give(data)
    return 0


def _show_picture(path: Path, console: Console) -> int:
    from spectral_diffusion.generation.picture_file import read_drawing

    drawing = read_drawing(path)
    console.say(f"{path}\n  prompt      {drawing.prompt}")
    if drawing.negative_prompt:
        console.say(f"  not         {drawing.negative_prompt}")
    size = f", {drawing.size[0]}x{drawing.size[1]} pixels" if drawing.size else ""
    guidance = f", guidance {drawing.guidance:g}" if drawing.guidance is not None else ""
    how = f"{drawing.scheduler}, {drawing.steps} steps{guidance}"
    console.say(f"  drawn by    {how}, seed {drawing.seed}{size}")
    for region in drawing.regions:
        console.say(f"  region      {','.join(f'{edge:g}' for edge in region.box)}={region.prompt}")
    data = asdict(drawing)
    data["regions"] = [{key: value for key, value in region.items() if key != "mask"} for region in data["regions"]]
    console.give({"path": str(path)} | data)
    return 0


def _compare(adapter: Adapter, base: Base) -> dict[str, Any]:
    from spectral_diffusion.adapters.fit import band_misfit

    reason, misfit = None, None
    try:
        misfit = band_misfit(base, adapter)
    except AdapterError as error:
        reason = str(error)
    same = adapter.fingerprint == base.fingerprint if adapter.fingerprint else None
    return {"source": base.source, "fits": reason is None, "reason": reason, "trained_on_it": same, "misfit": misfit}


def _verdict(base: dict[str, Any]) -> Iterator[str]:
    from spectral_diffusion.adapters.fit import misfit_in_words

    if not base["fits"]:
        yield f"  does not fit  {base['reason']}"
        return
    origins = {True: "it was trained on it", False: "though it was trained on another base of the family"}
    yield f"  fits        {base['source']}; {origins.get(base['trained_on_it'], 'what it was trained on is not known')}"
    if base["misfit"]:
        yield f"  bands off   {misfit_in_words(base['misfit'])}"
