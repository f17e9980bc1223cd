"""What the command line writes: text and data on stdout, progress, warnings and errors on stderr."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from spectral_diffusion.cli.outputs import check_file
from spectral_diffusion.errors import InputError
from spectral_diffusion.files import write_atomically
from spectral_diffusion.stages import counted

_LIBRARIES = ("torch", "transformers", "torch._dynamo", "diffusers", "peft")
STDOUT = "-"
"""Given to `--json` for the terminal."""


@dataclass(frozen=True, kw_only=True)
class Console:
    """Where a command writes. `json_target` is a file for its data, `-` for stdout, or None."""

    json_target: str | None = None

    def check(self) -> None:
        """Check that the data can be written, before any work is done.

        Raises:
            InputError: the file is a folder.
            StorageError: the folder cannot be made or written to.
        """
        if self.json_target not in (None, STDOUT):
            check_file(Path(self.json_target), "--json")

    def keep_off(self, path: Path) -> None:
        """Raise `InputError` when the data would overwrite `path`, which the command reads or writes otherwise."""
        if self.json_target not in (None, STDOUT) and Path(self.json_target).resolve() == path.resolve():
            raise InputError(f"'{path}' is used by this command and would be overwritten; choose another --json.")

    def say(self, text: str) -> None:
        """Write a line for people; to stderr when stdout is for data. Where nobody reads any more, the work goes on."""
        try:
            tqdm.write(text, file=sys.stderr if self.json_target == STDOUT else sys.stdout)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def give(self, data: Any) -> None:
        """Write `data` as JSON where the user asked for it.

        Raises:
            StorageError: the file could not be written.
        """
        if self.json_target is None:
            return
        if self.json_target == STDOUT:
            print(json.dumps(data, indent=2))  # in ASCII, which a terminal or a pipe of any encoding leaves as it is
        else:
            text = json.dumps(data, indent=2, ensure_ascii=False)
            write_atomically(Path(self.json_target), lambda path: path.write_text(f"{text}\n", encoding="utf-8"))


def progress_bar(what: str, total: int, unit: str, done: int = 0, *, stays: bool = True) -> tqdm:
    """Return a progress bar on stderr that shows the remaining time; seldom redrawn where stderr is a file."""
    return tqdm(desc=what, total=total, unit=unit, initial=done, leave=stays, **bar_style())


def bar_style() -> dict[str, Any]:
    """Return the options that all progress bars share."""
    return {"file": sys.stderr, "mininterval": 0.2 if sys.stderr.isatty() else 5.0, "dynamic_ncols": True}


class _Lines(logging.Handler):
    """Writes records as plain lines, without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "Warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(f"{mark}{record.getMessage()}", file=sys.stderr)


@contextmanager
def log_lines_on_stderr() -> Iterator[None]:
    """While entered, what the library logs stands on stderr, one plain line each."""
    logger, handler = logging.getLogger("spectral_diffusion"), _Lines(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def survive_any_encoding() -> None:
    """Let a terminal that cannot show a letter show a question mark instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def open_libraries() -> None:
    """Import what takes seconds, as a stage that one sees, and silence what it prints while it loads models.

    Downloads keep their bars.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in counted("starting", "library", _LIBRARIES):
        import_module(library)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()


@contextmanager
def stop_on_interrupt(notice: str) -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed; the first shows `notice`, a second one ends at once."""
    pressed = False

    def on_interrupt(signal_number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)
        tqdm.write(notice, file=sys.stderr)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
