"""`spectral-diffusion train`: photos of one concept in, an adapter file out."""

from __future__ import annotations

import argparse
import logging
from contextlib import closing
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_diffusion.cli.console import Console, quiet_libraries, stop_on_interrupt
from spectral_diffusion.cli.describe import adapter_data, adapter_lines
from spectral_diffusion.cli.displays import CountDisplay, TrainingDisplay
from spectral_diffusion.cli.options import (
    add_base_options,
    add_device_option,
    add_json_option,
    add_out_options,
    load_chosen_base,
)
from spectral_diffusion.cli.outputs import check_output, check_writable

if TYPE_CHECKING:
    from spectral_diffusion.bands import Band
    from spectral_diffusion.base import Base
    from spectral_diffusion.concept import Concept
    from spectral_diffusion.training import TrainingResult, TrainingSettings

SUMMARY = "train one concept from a folder of photos"

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; the settings and their help come from `TrainingSettings`."""
    from spectral_diffusion.training import PRESETS

    parser.add_argument(
        "photos",
        type=Path,
        metavar="PHOTOS",
        help="folder with photos of one concept; captions NAME.txt, masks NAME-mask.png and concept.toml may be there",
    )
    parser.add_argument("--token", metavar="WORD", help='the word that calls the concept in prompts, such as "<V1>"')
    parser.add_argument("--class-word", metavar="WORD", help="what it is, in a word that the base knows, such as dog")
    parser.add_argument("--preset", choices=PRESETS, default="balanced", help="how long to train (default: %(default)s)")
    add_out_options(parser, "the adapter")
    parser.add_argument(
        "--avoid",
        action="append",
        type=Path,
        default=[],
        metavar="PLACE",
        help="an adapter, or a folder of adapters, whose bands are taken; repeatable",
    )
    parser.add_argument("--band", type=int, metavar="START", help="first singular direction (default: the next free band)")
    parser.add_argument("--allow-overlap", action="store_true", help="accept a --band that an avoided adapter has taken")
    add_base_options(parser)
    add_device_option(parser)
    add_json_option(parser, "what was trained")
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    from spectral_diffusion.parametrisations import PARAMETRISATIONS
    from spectral_diffusion.training import TrainingSettings

    group = parser.add_argument_group("settings", "Each goes before what the preset says.")
    for field in fields(TrainingSettings):
        choices = tuple(PARAMETRISATIONS) if field.name == "parametrisation" else None
        group.add_argument(f"--{field.name.replace('_', '-')}", choices=choices, **_setting_options(field))


def _setting_options(field: Field[Any]) -> dict[str, Any]:
    help_text = field.metadata["help"].replace("%", "%%")
    if isinstance(field.default, tuple):
        return {"nargs": "+", "metavar": "NAME", "help": help_text}
    kind = type(field.default)
    metavar = None if kind is str else {int: "N", float: "X"}[kind]
    return {"type": kind, "metavar": metavar, "help": help_text}


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Train, save, and say what was made; a stopped training keeps its checkpoint and returns 1."""
    check_output(arguments.out, force=arguments.force)
    quiet_libraries()
    from spectral_diffusion.adapter_file import save_adapter
    from spectral_diffusion.concept import load_concept

    concept = load_concept(arguments.photos, token=arguments.token, class_word=arguments.class_word)
    base = load_chosen_base(arguments)
    settings = _chosen_settings(arguments, base)
    band = _chosen_band(arguments, base, settings, concept.token, console)
    checkpoint = arguments.out.with_name(f"{arguments.out.name}.checkpoint")
    result = _train(base, concept, band, settings, checkpoint, arguments.out)
    if not result.finished:
        return _say_how_to_resume(result, settings, checkpoint)
    save_adapter(result.adapter, arguments.out)
    checkpoint.unlink(missing_ok=True)
    _report(result, arguments.out, console)
    return 0


def _chosen_settings(arguments: argparse.Namespace, base: Base) -> TrainingSettings:
    """Return the preset's settings, with what was given on the command line in their place."""
    from spectral_diffusion.training import TrainingSettings, preset

    given = {field.name: getattr(arguments, field.name) for field in fields(TrainingSettings)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(preset(arguments.preset, base), **changes)


def _chosen_band(arguments: argparse.Namespace, base: Base, settings: TrainingSettings, token: str, console: Console) -> Band:
    """Return the concept's band and say how many concepts the base has room for."""
    from spectral_diffusion.band_plan import choose_band, fewest_directions, taken_bands
    from spectral_diffusion.bands import slots

    taken = taken_bands(arguments.avoid, base, except_for=arguments.out)
    for other in taken:
        if other.token.lower() == token.lower():
            logger.warning("'%s' uses the token '%s' too, so the two can never be fused.", other.path, other.token)
    with closing(CountDisplay("spectrum", "layer")) as display:
        directions = fewest_directions(base, settings.layers, display.show)
    band = choose_band(arguments.band, settings.rank, directions, taken, allow_overlap=arguments.allow_overlap)
    console.say(
        f"The base has room for {slots(directions, settings.rank)} concepts of rank {settings.rank}; "
        f"{token} gets the singular directions {band}."
    )
    return band


def _train(base: Base, concept: Concept, band: Band, settings: TrainingSettings, checkpoint: Path, out: Path) -> TrainingResult:
    """Train with a progress bar until the end or Ctrl-C."""
    from spectral_diffusion.training import train

    samples = out.with_name(f"{out.stem}-samples")
    if settings.sample_every:
        check_writable(samples)
    notice = "Stopping after this step; press Ctrl-C again to leave at once."
    with stop_on_interrupt(notice) as should_stop, closing(TrainingDisplay(samples)) as display:
        return train(base, concept, band, settings, checkpoint=checkpoint, on_progress=display.show, should_stop=should_stop)


def _say_how_to_resume(result: TrainingResult, settings: TrainingSettings, checkpoint: Path) -> int:
    logger.warning(
        "Stopped after step %d of %d, kept in '%s'; run the same command again to go on from there.",
        result.steps_done,
        settings.steps,
        checkpoint,
    )
    return 1


def _report(result: TrainingResult, out: Path, console: Console) -> None:
    data = adapter_data(result.adapter, out) | {"steps": result.steps_done, "seconds": round(result.seconds, 1)}
    console.say(f"Trained in {result.seconds:.0f} seconds:")
    for line in adapter_lines(data):
        console.say(line)
    console.give(data)
