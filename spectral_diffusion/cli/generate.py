"""`spectral-diffusion generate`: draw pictures."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_diffusion.cli.console import Console, bar_style, open_libraries, progress_bar
from spectral_diffusion.cli.options import add_base_options, add_device_option, add_json_option, load_chosen_base, picture_size
from spectral_diffusion.cli.outputs import check_writable
from spectral_diffusion.errors import InputError

if TYPE_CHECKING:
    from spectral_diffusion.adapters.adapter import Adapter
    from spectral_diffusion.bases.base import Base
    from spectral_diffusion.generation.condition_picture import Condition
    from spectral_diffusion.generation.drawing import Drawing, Picture
    from spectral_diffusion.generation.regions import Region

SUMMARY = "draw pictures, with an adapter or without"

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--adapter", type=Path, metavar="FILE", help="an adapter file (default: the bare base draws)")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help='what to draw, such as "<V1> near a lake"')
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to draw")
    add_drawing_options(parser)
    parser.add_argument(
        "--region",
        action="append",
        default=[],
        metavar="BOX=TEXT",
        help='draw TEXT in a part of the picture: "0.05,0.2,0.45,0.95=<V1>" (left, top, right, bottom as fractions); repeatable',
    )
    parser.add_argument(
        "--regions", metavar="FILE", help="a JSON list of regions; 'auto' gives each token of the prompt a column of its own"
    )
    parser.add_argument(
        "--confined",
        action=argparse.BooleanOptionalAction,
        help="let each concept's own model draw its regions (default: unless they were trained in one go)",
    )
    parser.add_argument("--condition", type=Path, metavar="FILE", help="a sketch or pose that the picture follows")
    parser.add_argument("--condition-photo", action="store_true", help="it is a photo or drawing: trace the sketch from it")
    parser.add_argument(
        "--condition-adapter",
        metavar="PATH",
        help="the T2I-Adapter that reads it: a diffusers folder or a hub id (the embedded base has its own, for sketches)",
    )
    parser.add_argument("--condition-strength", type=float, metavar="X", help="how strictly it is followed (default: 1)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="pictures at once (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the pictures are added")
    parser.add_argument(
        "--whole",
        action="store_true",
        help="use every concept of the adapter, as other tools do, not only those that the prompt names",
    )
    add_base_options(parser)
    add_device_option(parser)
    add_json_option(parser, "the list of pictures")


def add_drawing_options(
    parser: argparse.ArgumentParser,
    without: Sequence[str] = (),
    seed: str = "seed of the first picture; each next has one more (default: any)",
) -> None:
    """Add the options whose defaults are those of `Drawing`, all but those called in `without`; `seed` is that one's help."""
    from spectral_diffusion.generation.drawing import SCHEDULERS, Drawing

    default = {field.name: field.default for field in fields(Drawing)}
    options: dict[str, dict[str, Any]] = {
        "count": {"type": int, "metavar": "N", "help": f"how many pictures (default: {default['count']})"},
        "seed": {
            "type": int,
            "metavar": "N",
            "help": seed,
        },
        "steps": {"type": int, "metavar": "N", "help": f"denoising steps (default: {default['steps']})"},
        "guidance": {
            "type": float,
            "metavar": "X",
            "help": "how strictly the prompt is followed (default: the base's own: 2.5 for the embedded one, else 5)",
        },
        "sampler": {
            "dest": "scheduler",
            "choices": tuple(SCHEDULERS),
            "metavar": "NAME",
            "help": f"one of {', '.join(SCHEDULERS)} (default: {default['scheduler']})",
        },
        "size": {"type": picture_size, "metavar": "WxH", "help": "in pixels (default: the base's own)"},
    }
    for name, option in options.items():
        if name not in without:
            parser.add_argument(f"--{name}", **option)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Draw the pictures and save each as soon as it is ready."""
    open_libraries()
    from spectral_diffusion.adapters.adapter_file import load_adapter
    from spectral_diffusion.generation.album import Album
    from spectral_diffusion.generation.generate import generate
    from spectral_diffusion.prompts.tokens import marked_words

    adapter = load_adapter(arguments.adapter) if arguments.adapter else None
    drawing = _drawing(arguments, adapter.class_words if adapter else {})
    check_writable(arguments.out)
    base = load_chosen_base(arguments)
    if adapter is not None:
        _check_fit(base, adapter)
        _warn_if_lost(adapter, drawing)
    unknown = marked_words(drawing.words, adapter.tokens if adapter else ())
    if unknown:
        having = f"has {', '.join(adapter.tokens)}" if adapter else "is missing"
        logger.warning("The prompt names %s, but the adapter %s; it is read as plain letters.", ", ".join(unknown), having)
    _show_steps(base)
    album = Album(arguments.out, Path(base.source).name)
    records: list[dict[str, Any]] = []
    with progress_bar("pictures", drawing.count, "picture") as bar:

        def keep(picture: Picture) -> None:
            path = album.add(picture)
            tokens = list(picture.tokens)
            records.append({"path": str(path), "seed": picture.seed, "prompt": picture.drawing.prompt, "tokens": tokens})
            console.say(str(path))
            bar.update()

        generate(base, drawing, adapter, whole=arguments.whole, batch=arguments.batch, on_picture=keep)
    console.give({"pictures": records})
    return 0


def _drawing(arguments: argparse.Namespace, class_words: Mapping[str, str]) -> Drawing:
    """Return what to draw: what was given goes before the defaults of `Drawing`."""
    from spectral_diffusion.generation.drawing import Drawing, random_seed

    if arguments.whole and arguments.adapter is None:
        raise InputError("--whole is about an adapter's concepts; give --adapter too, or leave it out.")
    if arguments.batch < 1:
        raise InputError(f"batch must be at least 1, got {arguments.batch}.")
    given = {field.name: getattr(arguments, field.name) for field in fields(Drawing)}
    given["regions"] = _regions(arguments, class_words)
    given["condition"] = _condition(arguments)
    given = {"seed": random_seed()} | {name: value for name, value in given.items() if value is not None}
    return Drawing(**given)


def _regions(arguments: argparse.Namespace, class_words: Mapping[str, str]) -> tuple[Region, ...]:
    from spectral_diffusion.generation.regions import parse_region, read_regions, suggest_regions

    listed: tuple[Region, ...] = ()
    if arguments.regions == "auto":
        listed = suggest_regions(arguments.prompt, class_words)
        if not listed:
            having = f"of {', '.join(class_words)}" if class_words else "without --adapter"
            raise InputError(f"--regions auto gives each token of the prompt a column, but it names none {having}.")
    elif arguments.regions is not None:
        listed = read_regions(Path(arguments.regions))
    listed = (*listed, *(parse_region(text) for text in arguments.region))
    if arguments.confined is not None and not listed:
        raise InputError("--confined and --no-confined say how regions are drawn; give --region or --regions too.")
    return listed


def _condition(arguments: argparse.Namespace) -> Condition | None:
    from spectral_diffusion.generation.condition_picture import read_condition

    options = {"adapter": "condition_adapter", "strength": "condition_strength", "photo": "condition_photo"}
    given = {name: value for name, option in options.items() if (value := getattr(arguments, option)) not in (None, False)}
    if arguments.condition is not None:
        return read_condition(arguments.condition, **given)
    if given:
        raise InputError(f"--condition-{next(iter(given))} says how --condition is read; give the picture too.")
    return None


def _check_fit(base: Base, adapter: Adapter) -> None:
    """Refuse an adapter of another family; tell how well one of another base fits."""
    from spectral_diffusion.adapters.attach import check_fits_base
    from spectral_diffusion.adapters.fit import ROUNDING, band_misfit, misfit_in_words

    check_fits_base(base, adapter)
    if adapter.fingerprint == base.fingerprint:
        return
    misfit = band_misfit(base, adapter)
    if max(misfit.values(), default=0) > ROUNDING:
        words = misfit_in_words(misfit)
        logger.warning("The adapter was trained on another base of the family; its bands are off by %s.", words)


def _warn_if_lost(adapter: Adapter, drawing: Drawing) -> None:
    from spectral_diffusion.adapters.fusion import trained_apart
    from spectral_diffusion.generation.generate import named_only

    named = named_only(adapter, drawing.words)
    if not named.concepts:
        logger.warning("The prompt names none of the adapter's concepts (%s).", ", ".join(adapter.tokens))
    elif not drawing.regions and trained_apart(named.concepts):
        listed = ", ".join(named.tokens)
        logger.warning("%s were trained apart and disturb each other; --regions auto draws each by its own model.", listed)


def _show_steps(base: Base) -> None:
    """Let the pipeline show a bar over the steps of each batch."""
    base.pipeline.set_progress_bar_config(desc="drawing", unit="step", leave=False, disable=False, **bar_style())
