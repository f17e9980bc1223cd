"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from spectral_diffusion.errors import InputError

if TYPE_CHECKING:
    from spectral_diffusion.bases.base import Base


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without the usage."""

    def __init__(self, *arguments: object, **options: object):
        super().__init__(*arguments, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Write `message` and where to read more, and exit with code 2."""
        self.exit(2, f"Error: {message} (see '{self.prog} --help').\n")


def add_base_options(parser: argparse.ArgumentParser, default: str = "the embedded base, a small toy world") -> None:
    """Add `--base` and `--prediction-type`; `default` says what stands where the former is left out."""
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="Stable Diffusion 1, 2 or XL: one checkpoint file (.safetensors, .ckpt), a diffusers folder or a hub id "
        f"(default: {default})",
    )
    parser.add_argument(
        "--prediction-type",
        choices=("epsilon", "v_prediction"),
        help="what the base was trained to predict (default: what its files say)",
    )


def add_device_option(parser: argparse.ArgumentParser, default: str = "a GPU if there is one") -> None:
    """Add `--device`; `default` says what stands where it is left out."""
    parser.add_argument("--device", metavar="NAME", help=f"cpu, cuda, cuda:1, mps (default: {default})")


def add_json_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--json` for the data called `what`."""
    parser.add_argument("--json", metavar="PATH", help=f"also write {what} as JSON to this file; - for the terminal")


def add_references_option(parser: argparse._ActionsContainer, purpose: str) -> None:
    """Add `--references`, pairs of token and folder for `unique_pairs`; `purpose` says what the photos are for."""
    parser.add_argument(
        "--references",
        action="append",
        type=pair_type('"<V1>=folder"'),
        default=[],
        metavar="TOKEN=FOLDER",
        help=f"a concept's photos, {purpose}; repeatable",
    )


def add_out_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--out` for a safetensors file and `--force` to overwrite it."""
    parser.add_argument("--out", type=safetensors_file, required=True, metavar="FILE", help=f"{what}, a .safetensors file")
    parser.add_argument("--force", action="store_true", help="overwrite --out if it exists")


def load_chosen_base(arguments: argparse.Namespace) -> Base:
    """Return the base that `--base`, `--prediction-type` and `--device` ask for, to compute with.

    Raises:
        BaseError: it cannot be loaded.
        InputError: there is no such device.
    """
    from spectral_diffusion.bases.base import load_base

    check_device(arguments.device)
    return load_base(arguments.base, device=arguments.device, prediction_type=arguments.prediction_type)


def read_chosen_base(arguments: argparse.Namespace) -> Base:
    """Return the base that `--base` and `--prediction-type` ask for, only to be read.

    Raises:
        BaseError: it cannot be read.
    """
    from spectral_diffusion.bases.base import read_base

    return read_base(arguments.base, prediction_type=arguments.prediction_type)


def check_device(name: str | None) -> None:
    """Raise `InputError` when this computer has no torch device called `name`."""
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"There is no device '{name}' on this computer; give cpu, or leave --device out.") from error


def safetensors_file(text: str) -> Path:
    """Return a path that ends in `.safetensors`."""
    path = Path(text)
    if path.suffix.lower() != ".safetensors":
        raise argparse.ArgumentTypeError(f"'{text}' does not end in .safetensors")
    return path


def html_file(text: str) -> Path:
    """Return a path that ends in `.html`."""
    path = Path(text)
    if path.suffix.lower() != ".html":
        raise argparse.ArgumentTypeError(f"'{text}' does not end in .html")
    return path


def picture_size(text: str) -> tuple[int, int]:
    """Return `(width, height)` from `512x768`."""
    try:
        width, height = (int(edge) for edge in text.lower().split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 512x768") from error
    return width, height


def pair_type(example: str) -> Callable[[str], tuple[str, str]]:
    """Return the type of values `TOKEN=...`; `example` is shown when one is not."""

    def pair(text: str) -> tuple[str, str]:
        token, _, value = (part.strip() for part in text.partition("="))
        if not token or not value:
            raise argparse.ArgumentTypeError(f"'{text}' is not of the form {example}")
        return token, value

    return pair


def unique_pairs(pairs: Sequence[tuple[str, str]], option: str) -> dict[str, str]:
    """Return `pairs` as a dictionary.

    Raises:
        InputError: one token stands there twice.
    """
    tokens = [token for token, _ in pairs]
    twice = next((token for token in tokens if tokens.count(token) > 1), None)
    if twice is not None:
        raise InputError(f"{option} names '{twice}' twice; give each token once.")
    return dict(pairs)
