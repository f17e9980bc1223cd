"""Write files so that no half file ever stands where a good one stood."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from spectral_diffusion.errors import StorageError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path`, then put the result in place in one step.

    Raises:
        StorageError: the folder cannot be made or written, or the disk is full; `path` is as it was.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".writing-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except StorageError:
        raise
    except Exception as error:
        if not is_storage_failure(error):
            raise
        raise StorageError(
            f"'{path}' could not be written ({error}); free some space or choose a folder that you may write to."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def is_storage_failure(error: Exception) -> bool:
    """Tell whether `error` comes from the file system (safetensors reports it as its own kind of error)."""
    return isinstance(error, OSError) or (type(error).__name__ == "SafetensorError" and "os error" in str(error).lower())
