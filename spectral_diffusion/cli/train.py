"""`spectral-diffusion train`: photos of one concept or several in, an adapter file each out."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_diffusion.cli.console import Console, open_libraries, stop_on_interrupt
from spectral_diffusion.cli.describe import adapter_data, adapter_lines
from spectral_diffusion.cli.displays import STOPPING, TrainingDisplay, how_to_resume
from spectral_diffusion.cli.options import (
    add_base_options,
    add_device_option,
    add_json_option,
    load_chosen_base,
    safetensors_file,
)
from spectral_diffusion.cli.outputs import check_output, check_writable
from spectral_diffusion.errors import BandError, InputError

if TYPE_CHECKING:
    from spectral_diffusion.adapters.adapter import Adapter, ConceptPart
    from spectral_diffusion.bases.base import Base
    from spectral_diffusion.concepts.concept import Concept
    from spectral_diffusion.spectra.bands import Band
    from spectral_diffusion.training import TrainingResult, TrainingSettings

SUMMARY = "train a concept from a folder of photos, or several at once"

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; the settings and their help come from `TrainingSettings`."""
    from spectral_diffusion.training import PRESETS

    parser.add_argument(
        "photos",
        nargs="+",
        type=Path,
        metavar="PHOTOS",
        help="folder with photos of one concept; captions NAME.txt, masks NAME-mask.png and concept.toml may be there. "
        "Several folders are several concepts, trained in one go and among one another: sooner than one by one",
    )
    parser.add_argument("--token", nargs="+", metavar="WORD", help='the word that calls each concept in prompts, such as "<V1>"')
    parser.add_argument(
        "--class-word", nargs="+", metavar="WORD", help="what each is, in a word that the base knows, such as dog"
    )
    parser.add_argument("--preset", choices=PRESETS, default="balanced", help="how long to train (default: %(default)s)")
    parser.add_argument(
        "--out", nargs="+", type=safetensors_file, required=True, metavar="FILE", help="each adapter, a .safetensors file"
    )
    parser.add_argument(
        "--start",
        nargs="+",
        type=safetensors_file,
        metavar="FILE",
        help="train longer: an adapter of each concept to go on from, on the band that it has, for as many more steps",
    )
    parser.add_argument("--force", action="store_true", help="overwrite --out if it exists")
    parser.add_argument(
        "--avoid",
        action="append",
        type=Path,
        default=[],
        metavar="PLACE",
        help="an adapter, or a folder of adapters, to be drawn together with: their bands are left to them, and a share of the "
        "steps (--presence) is made while they are attached; repeatable",
    )
    parser.add_argument(
        "--band", type=int, metavar="START", help="first singular direction; more concepts follow (default: free bands)"
    )
    parser.add_argument(
        "--allow-overlap", action="store_true", help="accept a --band, or that of --start, that an avoided adapter has taken"
    )
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
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": help_text}
    metavar = None if kind is str else {int: "N", float: "X"}[kind]
    return {"type": kind, "metavar": metavar, "help": help_text}


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Train, save, and say what was made; a stopped training keeps its checkpoint and returns 1."""
    outs: list[Path] = arguments.out
    tokens, class_words, starts = (_one_each(arguments, name) for name in ("token", "class_word", "start"))
    if len(_one_each(arguments, "out")) > len({out.resolve() for out in outs}):
        raise InputError("Two concepts have the same --out; give each a file of its own.")
    for out in outs:
        check_output(out, force=arguments.force)
    open_libraries()
    from spectral_diffusion.adapters.adapter_file import load_adapter, save_adapter
    from spectral_diffusion.adapters.band_plan import known_adapters, neighbours
    from spectral_diffusion.concepts.concept import load_concept

    named = zip(arguments.photos, tokens, class_words, strict=True)
    concepts = [load_concept(photos, token=token, class_word=class_word) for photos, token, class_word in named]
    base = load_chosen_base(arguments)
    settings = _chosen_settings(arguments, base)
    words = [concept.token for concept in concepts]
    known = known_adapters(arguments.avoid, base, except_for=[*outs, *(arguments.start or ())])
    start = [load_adapter(path) for path in starts if path]
    if start:
        if arguments.band is not None:
            raise InputError("--start goes on on the band that the adapter has; leave --band out.")
        parts = [adapter.concept(word) for adapter, word in zip(start, words, strict=True)]
        bands = _bands_again(parts, settings.rank, known, arguments)
    else:
        bands = _chosen_bands(arguments, base, settings, words, known, console)
    among = neighbours(known, words)
    checkpoint = outs[0].with_name(f"{outs[0].name}.checkpoint")
    results = _train(base, list(zip(concepts, bands, strict=True)), settings, among, start, checkpoint, outs)
    if not results[0].finished:
        return how_to_resume(results[0].steps_done, settings.steps, checkpoint)
    for result, out in zip(results, outs, strict=True):
        save_adapter(result.adapter, out)
    checkpoint.unlink(missing_ok=True)
    _report(results, outs, console)
    return 0


def _one_each(arguments: argparse.Namespace, name: str) -> list[Any]:
    """Return what was given as option `name`, one for each folder of photos; as many times nothing where it was left out.

    Raises:
        InputError: there are more or fewer.
    """
    given, folders = getattr(arguments, name), len(arguments.photos)
    if given is not None and len(given) != folders:
        option = f"--{name.replace('_', '-')}"
        raise InputError(
            f"{option} has {len(given)} values for {folders} folder(s) of photos; give one for each, in their order."
        )
    return given or [None] * folders


def _chosen_settings(arguments: argparse.Namespace, base: Base) -> TrainingSettings:
    """Return the preset's settings, with what was given on the command line in their place."""
    from spectral_diffusion.training import TrainingSettings, preset

    given = {field.name: getattr(arguments, field.name) for field in fields(TrainingSettings)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    changes = {name: value for name, value in given.items() if value is not None}
    return preset(arguments.preset, base, concepts=len(arguments.photos), changes=changes)


def _bands_again(
    parts: Sequence[ConceptPart], rank: int, known: dict[Path, Adapter], arguments: argparse.Namespace
) -> list[Band]:
    """Return the bands that concepts trained longer have, none of which another one has unless that is allowed."""
    from spectral_diffusion.adapters.band_plan import TakenBand, band_again, band_clash, taken_bands

    taken = taken_bands(known)
    for part, path in zip(parts, arguments.start, strict=True):
        clash = band_clash(part, taken)
        if clash is not None and not arguments.allow_overlap:
            raise BandError(f"{clash} Or give --allow-overlap.")
        if part.band:
            taken.append(TakenBand(token=part.token, band=part.band, path=path))
    return [band_again(part, rank) for part in parts]


def _chosen_bands(
    arguments: argparse.Namespace,
    base: Base,
    settings: TrainingSettings,
    tokens: Sequence[str],
    known: dict[Path, Adapter],
    console: Console,
) -> list[Band]:
    """Return a band for each concept and say how many concepts the base has room for; a form without bands needs none."""
    from spectral_diffusion.adapters.band_plan import TakenBand, choose_band, fewest_directions, taken_bands
    from spectral_diffusion.parametrisations import BANDED
    from spectral_diffusion.spectra.bands import Band, slots

    if settings.parametrisation not in BANDED:
        return [Band(start=0, rank=settings.rank)] * len(tokens)
    taken = taken_bands(known)
    for other in taken:
        if other.token.lower() in map(str.lower, tokens):
            logger.warning("'%s' uses the token '%s' too, so the two can never be fused.", other.path, other.token)
    directions = fewest_directions(base, settings.layers)
    console.say(f"The base has room for {slots(directions, settings.rank)} concepts of rank {settings.rank}.")
    bands = []
    for number, (token, out) in enumerate(zip(tokens, arguments.out, strict=True)):
        start = None if arguments.band is None else arguments.band + number * settings.rank
        band = choose_band(
            start,
            settings.rank,
            directions,
            taken,
            weakest_first=settings.weakest_first,
            allow_overlap=arguments.allow_overlap,
        )
        console.say(f"{token} gets the singular directions {band}.")
        taken.append(TakenBand(token=token, band=band, path=out))
        bands.append(band)
    return bands


def _train(
    base: Base,
    concepts: Sequence[tuple[Concept, Band]],
    settings: TrainingSettings,
    among: Adapter | None,
    start: Sequence[Adapter],
    checkpoint: Path,
    outs: Sequence[Path],
) -> list[TrainingResult]:
    """Train with a progress bar until the end or Ctrl-C."""
    from spectral_diffusion.training import train_together

    samples = [out.with_name(f"{out.stem}-samples") for out in outs]
    if settings.sample_every:
        for folder in samples:
            check_writable(folder)
    with stop_on_interrupt(STOPPING) as should_stop, closing(TrainingDisplay(samples)) as display:
        return train_together(
            base,
            concepts,
            settings,
            among=among,
            start=start,
            checkpoint=checkpoint,
            on_progress=display.show,
            should_stop=should_stop,
        )


def _report(results: Sequence[TrainingResult], outs: Sequence[Path], console: Console) -> None:
    """Say what was made; the data of one concept stands by itself, that of several in a list."""
    seconds = results[0].seconds
    console.say(f"Trained in {seconds:.0f} seconds:")
    made = [
        adapter_data(result.adapter, out) | {"steps": result.steps_done, "seconds": round(seconds, 1)}
        for result, out in zip(results, outs, strict=True)
    ]
    for data in made:
        for line in adapter_lines(data):
            console.say(line)
    console.give(made if len(made) > 1 else made[0])
