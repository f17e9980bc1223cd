"""Writing: whatever goes wrong, what stood there before stands there still or is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from spectral_diffusion.errors import StorageError
from spectral_diffusion.files import move, write_atomically, write_folder_atomically


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds something precious."""
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "weights").write_text("precious")
    return folder


def write_new(folder: Path) -> None:
    (folder / "weights").write_text("new")


def failing_from(call: int, error: BaseException, until: int = 99) -> Callable[[Path, Path], None]:
    """Return a move of files that fails in the calls from `call` until `until`."""
    calls = iter(range(1, 100))
    replace = os.replace

    def move(source: Path, target: Path) -> None:
        if call <= next(calls) <= until:
            raise error
        replace(source, target)

    return move


def test_a_file_that_somebody_reads_on_windows_is_replaced_once_it_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.replace", failing_from(1, PermissionError(13, "the page reads it"), until=3))
    write_atomically(tmp_path / "preview", lambda path: path.write_text("new"))
    assert (tmp_path / "preview").read_text() == "new"
    monkeypatch.setattr("spectral_diffusion.files._PATIENCE", 0.1)
    monkeypatch.setattr("os.replace", failing_from(1, PermissionError(13, "the page reads it")))
    with pytest.raises(StorageError, match=r"preview' could not be written .*the page reads it"):
        write_atomically(tmp_path / "preview", lambda path: path.write_text("newer"))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_that_somebody_reads_on_windows_is_moved_once_it_is_free(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.replace", failing_from(1, PermissionError(13, "the page reads it"), until=3))
    move(folder, tmp_path / "removed")
    assert (tmp_path / "removed" / "weights").read_text() == "precious" and not folder.exists()
    monkeypatch.setattr("spectral_diffusion.files._PATIENCE", 0.1)
    monkeypatch.setattr("os.replace", failing_from(1, PermissionError(13, "the page reads it")))
    with pytest.raises(StorageError, match=r"again' could not be written .*the page reads it"):
        move(tmp_path / "removed", tmp_path / "again")


@pytest.mark.parametrize("error", [PermissionError(13, "a scanner holds it"), KeyboardInterrupt()])
def test_a_folder_that_cannot_be_replaced_is_put_back(
    error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.replace", failing_from(2, error, until=2))
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else StorageError):
        write_folder_atomically(folder, write_new)
    assert (folder / "weights").read_text() == "precious"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_that_cannot_be_put_back_is_kept_and_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.replace", failing_from(2, PermissionError(13, "a scanner holds it")))
    with pytest.raises(StorageError, match=r"merged' could not be written .* it lies in '.*': move it back") as raised:
        write_folder_atomically(folder, write_new)
    (kept,) = folder.parent.iterdir()
    assert str(kept) in str(raised.value) and (kept / "weights").read_text() == "precious"


def test_a_folder_is_replaced_and_nothing_else_is_left(folder: Path) -> None:
    write_folder_atomically(folder, write_new)
    assert (folder / "weights").read_text() == "new" and list(folder.parent.iterdir()) == [folder]
