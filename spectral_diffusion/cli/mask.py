"""`spectral-diffusion mask`: make masks for photos that have none."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from spectral_diffusion.cli.console import Console
from spectral_diffusion.cli.options import add_json_option

if TYPE_CHECKING:
    from spectral_diffusion.concepts.masks import SuggestedMask

SUMMARY = "make masks of what stands out in photos, where they have none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("photos", type=Path, metavar="FOLDER", help="the photos of one concept; a mask that is there stays")
    add_json_option(parser, "the list of masks")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Write the masks and name each."""
    from spectral_diffusion.concepts.masks import write_suggested_masks

    def show(mask: SuggestedMask) -> None:
        nothing = f"{mask.photo}: nothing stands out; it is used without a mask"
        console.say(nothing if mask.path is None else f"{mask.path}  {mask.share:.0%} of the photo")

    made = write_suggested_masks(arguments.photos, on_mask=show)
    console.say("Look at them: white is the concept. Correct one in a picture editor or in the studio, or remove it.")
    records = [{"photo": str(one.photo), "mask": one.path and str(one.path), "share": one.share} for one in made]
    console.give({"masks": records})
    return 0
