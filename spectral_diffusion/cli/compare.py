"""`spectral-diffusion compare`: a labelled grid of pictures, and the table of their scores."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from spectral_diffusion.cli.console import Console, open_libraries, progress_bar
from spectral_diffusion.cli.generate import add_drawing_options
from spectral_diffusion.cli.options import (
    add_base_options,
    add_device_option,
    add_json_option,
    add_references_option,
    load_chosen_base,
    pair_type,
    unique_pairs,
)
from spectral_diffusion.cli.outputs import check_output
from spectral_diffusion.errors import InputError

if TYPE_CHECKING:
    from spectral_diffusion.adapters.adapter import Adapter
    from spectral_diffusion.generation.drawing import Drawing
    from spectral_diffusion.reports.axis import Axis

SUMMARY = "draw a grid of pictures in which two things differ, with scores"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from spectral_diffusion.reports.axis import AXES

    parser.add_argument(
        "--adapter",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="an adapter file, called by its name without the suffix on an axis, where 'none' is the bare base; repeatable; "
        "the first one draws where no axis says which",
    )
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what to draw, unless an axis says it")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to draw")
    add_drawing_options(parser, without=("count",), seed="seed of every picture (default: any)")
    axis = pair_type('"seed=1,2,3"')
    names = f"one of {', '.join(AXES)}; prompts between |, other values between commas"
    parser.add_argument(
        "--x",
        type=axis,
        default=("seed", "1,2,3"),
        metavar="NAME=VALUES",
        help=f"what differs across: {names} (default: seed=1,2,3)",
    )
    parser.add_argument("--y", type=axis, required=True, metavar="NAME=VALUES", help="what differs down, written like --x")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the grid; the table FILE.csv lies beside it")
    parser.add_argument("--force", action="store_true", help="replace a grid that is there")
    add_references_option(parser, "to measure how much the pictures look like it")
    parser.add_argument("--clip", metavar="MODEL", help="what scores, as in 'score' (default: the embedded CLIP)")
    add_base_options(parser)
    add_device_option(parser)
    add_json_option(parser, "the scores")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Draw, score, and write the grid and the table."""
    if arguments.out.suffix.lower() != ".png":
        raise InputError(f"'{arguments.out}' does not end in .png; the grid is written as PNG.")
    table = arguments.out.with_suffix(".csv")
    for path in (arguments.out, table):
        check_output(path, force=arguments.force, inputs=arguments.adapter)
    references = unique_pairs(arguments.references, "--references")
    open_libraries()
    from spectral_diffusion.generation.album import Album
    from spectral_diffusion.reports.comparison import compare, write_comparison
    from spectral_diffusion.scoring.clip_scorer import load_scorer
    from spectral_diffusion.toyworld.judge import load_judge

    x, y = _axis(*arguments.x), _axis(*arguments.y)
    adapters, drawing = _adapters(arguments.adapter), _drawing(arguments, (x, y))
    base = load_chosen_base(arguments)
    device = str(base.device)
    with tempfile.TemporaryDirectory() as folder, progress_bar("pictures", len(x.values) * len(y.values), "picture") as bar:
        result = compare(
            base,
            drawing,
            adapters,
            x,
            y,
            Album(Path(folder), Path(base.source).name),
            load_scorer(arguments.clip, device=device),
            load_judge(device=device) if base.embedded else None,
            references={token: Path(folder) for token, folder in references.items()},
            on_picture=lambda path: bar.update() and None,
        )
    write_comparison(result, arguments.out)
    console.say(f"{arguments.out}\n{table}")
    console.give({"sheet": str(arguments.out), "table": str(table), "scores": [asdict(score) for score in result.scores]})
    return 0


def _axis(name: str, values: str) -> Axis:
    from spectral_diffusion.reports.axis import Axis

    return Axis.parse(name, values.split("|" if name == "prompt" else ","))


def _adapters(files: list[Path]) -> dict[str, Adapter | None]:
    from spectral_diffusion.adapters.adapter_file import load_adapter
    from spectral_diffusion.reports.axis import BARE

    adapters: dict[str, Adapter | None] = {}
    for file in files:
        if file.stem in adapters or file.stem == BARE:
            raise InputError(f"'{file}' cannot be called '{file.stem}' here, as another is; rename it.")
        adapters[file.stem] = load_adapter(file)
    return adapters | {BARE: None}


def _drawing(arguments: argparse.Namespace, axes: tuple[Axis, ...]) -> Drawing:
    from spectral_diffusion.generation.drawing import Drawing, random_seed

    prompts = [axis.values[0] for axis in axes if axis.name == "prompt"]
    given = {field.name: getattr(arguments, field.name, None) for field in fields(Drawing)}
    given = {"seed": random_seed()} | {name: value for name, value in given.items() if value is not None}
    return Drawing(**given | {"prompt": arguments.prompt or str(next(iter(prompts), ""))})
