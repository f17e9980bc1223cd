"""`spectral-diffusion info`: what an adapter file holds."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_diffusion.cli.console import Console, quiet_libraries
from spectral_diffusion.cli.describe import adapter_data, adapter_lines
from spectral_diffusion.cli.options import add_base_options, add_json_option, read_chosen_base
from spectral_diffusion.errors import AdapterError

if TYPE_CHECKING:
    from spectral_diffusion.adapter import Adapter
    from spectral_diffusion.base import Base

SUMMARY = "show what an adapter file holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("adapter", type=Path, metavar="FILE", help="an adapter file")
    add_base_options(parser)
    add_json_option(parser, "it")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Show the adapter, and how well it fits the base when one is given."""
    quiet_libraries()
    from spectral_diffusion.adapter_file import load_adapter
    from spectral_diffusion.band_map import band_map

    adapter = load_adapter(arguments.adapter)
    data = adapter_data(adapter, arguments.adapter) | {"band_map": band_map([adapter]).to_json()}
    lines = list(adapter_lines(data))
    if arguments.base is not None:
        data["base"] = _compare(adapter, read_chosen_base(arguments))
        lines += _verdict(data["base"])
    for line in lines:
        console.say(line)
    console.give(data)
    return 0


def _compare(adapter: Adapter, base: Base) -> dict[str, Any]:
    from spectral_diffusion.fit import band_misfit

    reason, misfit = None, None
    try:
        misfit = band_misfit(base, adapter)
    except AdapterError as error:
        reason = str(error)
    same = adapter.fingerprint == base.fingerprint if adapter.fingerprint else None
    return {"source": base.source, "fits": reason is None, "reason": reason, "trained_on_it": same, "misfit": misfit}


def _verdict(base: dict[str, Any]) -> Iterator[str]:
    from spectral_diffusion.fit import misfit_in_words

    if not base["fits"]:
        yield f"  does not fit  {base['reason']}"
        return
    origins = {True: "it was trained on it", False: "though it was trained on another base of the family"}
    yield f"  fits        {base['source']}; {origins.get(base['trained_on_it'], 'what it was trained on is not known')}"
    if base["misfit"]:
        yield f"  bands off   {misfit_in_words(base['misfit'])}"
