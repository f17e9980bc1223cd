"""Write files so that no half file ever stands where a good one stood."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from spectral_diffusion.errors import StorageError

Write = Callable[[Path], None]
"""Writes a file or folder at the path it is given."""


_WRITING = ".writing-"
_LEFT_OVER = 24 * 3600  # seconds after which nobody writes any more
_PATIENCE = 2.0  # seconds to wait for those who read what is to be replaced


def files_in(folder: Path, ending: str) -> list[Path]:
    """Return the files of `folder` whose names end in `ending`, by name, without what is being written."""
    return sorted(path for path in folder.glob(f"*{ending}") if path.is_file() and not path.name.startswith(_WRITING))


def numbered(stem: str) -> Iterator[str]:
    """Yield names for what may have to be told from others: `stem`, `stem-2`, `stem-3` ..."""
    yield stem
    yield from (f"{stem}-{number}" for number in count(2))


def reserve(path: Path) -> bool:
    """Make an empty file at `path`, to be overwritten; return whether it is ours: false where another process was first.

    Raises:
        StorageError: the folder cannot be made or written.
    """
    with _storage_failures(path), suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
        return True
    return False


def clear_leftovers(folder: Path) -> None:
    """Remove from `folder` what a process that was killed while it wrote left there a day ago or before."""
    for path in folder.glob(f"{_WRITING}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFT_OVER:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_atomically(path: Path, write: Write) -> None:
    """Call `write` with a temporary path beside `path`, then put the result in place in one step.

    Raises:
        StorageError: the folder cannot be made or written, or the disk is full; `path` is as it was.
    """
    write_together({path: write})


def write_together(writers: Mapping[Path, Write]) -> None:
    """Write several files that belong together: each to a temporary path first, and only when all are there, into place.

    Raises:
        StorageError: a folder cannot be made or written, or the disk is full; everything is as it was.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for path, write in writers.items():
            with _storage_failures(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                handle, name = tempfile.mkstemp(prefix=_WRITING, suffix=path.suffix, dir=path.parent)
                os.close(handle)
                temporaries[path] = Path(name)
                write(temporaries[path])
                with open(temporaries[path], "rb+") as file:
                    os.fsync(file.fileno())
                os.chmod(temporaries[path], 0o644)
        for path, temporary in temporaries.items():
            move(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """Move a file or folder to `target`, over a file that stands there.

    Windows refuses that for as long as somebody reads either of them, a page or a virus scanner; it is tried for a while.

    Raises:
        StorageError: it cannot be moved; both are as they were.
    """
    until = time.monotonic() + _PATIENCE
    while True:
        with _storage_failures(target):
            try:
                os.replace(source, target)
                return
            except PermissionError:
                if time.monotonic() > until:
                    raise
        time.sleep(0.02)


def write_folder_atomically(path: Path, write: Write) -> None:
    """Call `write` with an empty temporary folder beside `path`, then put it in the place of what stands there.

    Raises:
        StorageError: the folder cannot be made or written, or the disk is full; `path` is as it was, or where it lies is said.
    """
    temporary: Path | None = None
    try:
        with _storage_failures(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=_WRITING, dir=path.parent))
            new = temporary / "new"
            new.mkdir()
            write(new)
            # the old one lies under a name that `clear_leftovers` leaves alone: nothing else holds it for a moment
            _exchange(new, path, path.parent / f"{path.name}.replaced-{temporary.name.removeprefix(_WRITING)}")
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, path: Path, old: Path) -> None:
    """Move the folder `new` to `path`, what stands there to `old` and, unless it is needed still, away."""
    try:
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except BaseException as error:
        if old.exists() and not path.exists():
            _put_back(old, path, error)
        raise
    finally:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, path: Path, error: BaseException) -> None:
    try:
        os.replace(old, path)
    except OSError as another:
        raise StorageError(
            f"'{path}' could not be written ({error}), nor what stood there put back ({another}); it lies in '{old}': move it "
            "back yourself."
        ) from error


@contextmanager
def _storage_failures(path: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if not is_storage_failure(error):
            raise
        raise StorageError(
            f"'{path}' could not be written ({error}); free some space or choose a folder that you may write to."
        ) from error


def is_storage_failure(error: Exception) -> bool:
    """Tell whether `error` comes from the file system (safetensors reports it as its own kind of error)."""
    return isinstance(error, OSError) or (type(error).__name__ == "SafetensorError" and "os error" in str(error).lower())
