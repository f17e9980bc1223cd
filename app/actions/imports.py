"""Ordinary LoRAs of other tools, as adapters beside those that were trained here."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from app.actions.concepts import check_free_token
from app.actions.studio import Studio, concept_names, plain_name
from spectral_diffusion.adapters.adapter_file import save_adapter
from spectral_diffusion.bases.base import Base
from spectral_diffusion.errors import FamilyError, InputError
from spectral_diffusion.files import files_in, numbered, reserve, write_atomically
from spectral_diffusion.imports import import_lora
from spectral_diffusion.imports.tensors import PEFT_CONFIGURATION

_WORDS = {"--embedding": "its embedding", "--base": "the base in the tab Settings", "copy that here": "give that with it"}
"""What stands in the command's sentences, and what the page says instead."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What became of a LoRA: an adapter by `name`, with what is to be known of it, or None where a `job` makes it."""

    token: str
    name: str | None = None
    job: str | None = None
    remarks: tuple[str, ...] = ()


def add_lora(studio: Studio, files: Sequence[Path], token: str, class_word: str, embedding: Path | None = None) -> Imported:
    """Make an adapter of an uploaded LoRA; where nothing in it tells its family, a job does so with the chosen base.

    Args:
        files: the LoRA, and PEFT's configuration where there is one.
        embedding: the embedding that was trained with it.

    Raises:
        InputError: there is not one LoRA among `files`, it cannot be used, or the token or the class word cannot.
        StorageError: the disk is full.
    """
    token, class_word = check_free_token(studio, token, class_word)
    loras = [file for file in files if file.suffix.lower() != ".json"]
    wrong = next((file.name for file in files if file not in loras and file.name != PEFT_CONFIGURATION), None)
    if len(loras) != 1:
        raise InputError("Give the file of one LoRA: .safetensors, .bin or .pt.")
    if wrong is not None:
        raise InputError(f"'{wrong}' is no part of a LoRA; only PEFT's '{PEFT_CONFIGURATION}' is read beside one.")
    given = [("lora", file) for file in files] + ([("embedding", embedding)] if embedding else [])
    with tempfile.TemporaryDirectory(dir=studio.folder("uploads")) as name:
        folder = Path(name)
        for part, file in given:
            write_atomically(folder / part / file.name, lambda path, file=file: shutil.copyfile(file, path))
        try:
            with _heard() as warnings:
                made = import_files(studio, folder, token, class_word)
        except FamilyError:
            arguments = {"token": token, "class_word": class_word, "settings": asdict(studio.settings)}
            return Imported(token=token, job=studio.jobs.submit("import", f"Import {token}", arguments, files=folder))
        return Imported(token=token, name=made, remarks=tuple(_on_the_page(text, folder) for text in warnings))


def import_files(studio: Studio, folder: Path, token: str, class_word: str, base: Base | None = None) -> str:
    """Make an adapter of what lies in `folder`, the LoRA in `lora/` and its embedding in `embedding/`; return its name.

    Raises:
        InputError: it cannot be used; `FamilyError` where nothing tells its family and no base is given.
        StorageError: the disk is full.
    """
    lora = next(path for path in files_in(folder / "lora", "") if path.name != PEFT_CONFIGURATION)
    embedding = next(iter(files_in(folder / "embedding", "")), None)
    try:
        adapter = import_lora(lora, token=token, class_word=class_word, embedding=embedding, base=base)
    except FamilyError:
        raise
    except InputError as error:
        raise InputError(_on_the_page(str(error), folder)) from error
    path = _reserved(studio, plain_name(token))
    try:
        save_adapter(adapter, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return f"{path.parent.name}/{path.name}"


def _reserved(studio: Studio, stem: str) -> Path:
    """Return the adapter's file, which is ours; those that the concepts here write theirs to are left to them."""
    concepts = {name.lower() for name in concept_names(studio)}
    paths = (studio.folder("adapters") / f"{name}.safetensors" for name in numbered(stem) if name.lower() not in concepts)
    return next(path for path in paths if reserve(path))


def _on_the_page(sentence: str, folder: Path) -> str:
    """Return a sentence of the library as the page says it: files by the names under which they were uploaded."""
    for part in ("lora", "embedding"):
        sentence = sentence.replace(f"{folder / part}{os.sep}", "")
    for option, words in _WORDS.items():
        sentence = sentence.replace(option, words)
    return sentence


class _Ear(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:  # other pages may import too
            self.heard.append(record.getMessage())


@contextmanager
def _heard() -> Iterator[list[str]]:
    """While entered, collect what the library warns of."""
    ear, logger = _Ear(), logging.getLogger("spectral_diffusion.imports")
    logger.addHandler(ear)
    try:
        yield ear.heard
    finally:
        logger.removeHandler(ear)
