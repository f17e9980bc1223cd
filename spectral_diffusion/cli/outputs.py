"""Checks on output files, made before the work begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spectral_diffusion.errors import InputError
from spectral_diffusion.files import write_atomically


def check_output(path: Path, *, force: bool, inputs: Sequence[Path] = (), option: str = "--out") -> None:
    """Check that `path` can be written and overwrites nothing unasked.

    Args:
        force: whether a file that stands there may be overwritten.
        inputs: files that are read, or written otherwise, and must never be overwritten.
        option: what asks for `path`.

    Raises:
        InputError: the file exists, is a folder, or is one of `inputs`.
        StorageError: the folder cannot be made or written to.
    """
    if any(path.resolve() == source.resolve() for source in inputs):
        raise InputError(f"'{path}' is used by this command and would be overwritten; choose another {option}.")
    if path.is_file() and not force:
        raise InputError(f"'{path}' exists already; give --force to overwrite it, or choose another {option}.")
    check_file(path, option)


def check_file(path: Path, option: str) -> None:
    """Check that the file that `option` asks for can be written.

    Raises:
        InputError: it is a folder.
        StorageError: its folder cannot be made or written to.
    """
    if path.is_dir():
        raise InputError(f"'{path}' is a folder; give a file name as {option}.")
    check_writable(path.parent)


def check_writable(folder: Path) -> None:
    """Make `folder` if need be and check that files can be written there.

    Raises:
        StorageError: they cannot.
    """
    probe = folder / ".spectral-diffusion-probe"
    write_atomically(probe, lambda path: None)
    probe.unlink(missing_ok=True)
