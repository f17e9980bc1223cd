"""The library of concepts: cards, tokens, concepts made and removed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from app.actions.adapters import adapter_cards
from app.actions.photos import PhotoCard, make_thumbnails, photo_card
from app.actions.studio import Studio, concept_folder, concept_names, plain_name, put_away
from app.jobs import Job
from spectral_diffusion.concepts.concept import (
    SAMPLES_FOLDER,
    SETTINGS_FILE,
    check_class_word,
    check_new_word,
    check_token,
    read_words,
)
from spectral_diffusion.concepts.photos import list_pictures, read_photos
from spectral_diffusion.errors import InputError
from spectral_diffusion.files import numbered, write_atomically

SAMPLES = ("poodle", "black-cat", "raccoon")
"""Sample concepts that a new studio has."""
WORDS = "words.json"
"""The base's own words, which the worker writes down, in the studio's folder."""


@dataclass(frozen=True, kw_only=True)
class ConceptCard:
    """A concept on the page.

    Attributes:
        adapter: its file once it was trained.
        job: its latest training.
        problem: why its `concept.toml` cannot be read; there is nothing else then but the name, for a token too.
    """

    name: str
    token: str
    class_word: str
    photos: tuple[PhotoCard, ...]
    adapter: Path | None = None
    job: Job | None = None
    problem: str | None = None


def add_samples(studio: Studio) -> None:
    """Give a studio that has never had concepts the sample ones."""
    if any(studio.folder("concepts").iterdir()) or any(studio.folder("removed").iterdir()):
        return
    for name in SAMPLES:
        folder = studio.folder("concepts") / name
        shutil.copytree(SAMPLES_FOLDER / name, folder)
        (folder / SETTINGS_FILE).touch()
        make_thumbnails(studio, name, read_photos(folder).photos)


def concept_card(studio: Studio, name: str, jobs: Sequence[Job] | None = None) -> ConceptCard:
    """Return what the page shows of the concept called `name`."""
    folder = concept_folder(studio, name)
    token, class_word = read_words(folder)
    jobs = studio.jobs.jobs() if jobs is None else jobs
    adapter = studio.folder("adapters") / f"{name}.safetensors"
    return ConceptCard(
        name=name,
        token=token,
        class_word=class_word,
        photos=tuple(photo_card(studio, name, path) for path in list_pictures(folder)),
        adapter=adapter if adapter.is_file() else None,
        job=next((job for job in jobs if name in trained_by(job)), None),
    )


def trained_by(job: Job) -> list[str]:
    """Return the names of the concepts that `job` trains: none for other jobs, nor for one of an older queue."""
    return job.arguments.get("concepts", []) if job.kind == "train" else []


def concept_cards(studio: Studio) -> list[ConceptCard]:
    """Return the cards of all concepts; one whose settings cannot be read has a card that says so."""
    jobs, cards = studio.jobs.jobs(), []
    for name in concept_names(studio):
        try:
            cards.append(concept_card(studio, name, jobs))
        except InputError as error:
            cards.append(ConceptCard(name=name, token=name, class_word="", photos=(), problem=str(error)))
    return cards


def suggest_token(studio: Studio, class_word: str) -> str:
    """Return a token for a `class_word` that no concept has: `<dog>`, `<dog-2>` ..."""
    stem = plain_name("-".join(class_word.split())).lower() if class_word.strip() else "concept"
    taken = {token.lower() for token in _taken_tokens(studio)}
    return next(token for name in numbered(stem) if (token := f"<{name}>") not in taken)


def check_free_token(studio: Studio, token: str, class_word: str) -> tuple[str, str]:
    """Return `token` and `class_word` as a new concept has them.

    Raises:
        InputError: one of them cannot be used, or the base or another concept has the token.
    """
    token, class_word = check_token(token.strip()), check_class_word(class_word)
    check_new_word(token, _words_of_base(studio))
    for other in _taken_tokens(studio):
        if other.lower() == token.lower():
            raise InputError(
                f"Another concept has the token '{other}'; choose another, such as '{suggest_token(studio, class_word)}'."
            )
    return token, class_word


def create_concept(studio: Studio, token: str, class_word: str) -> str:
    """Make an empty concept and return its name.

    Raises:
        InputError: the token or the class word cannot be used, or the base or another concept has the token.
    """
    token, class_word = check_free_token(studio, token, class_word)
    folders = studio.folder("concepts")
    trained = {name for job in studio.jobs.jobs() for name in trained_by(job)}  # by a removed concept of that name, too
    names = (name for name in numbered(plain_name(token)) if name not in trained)
    name = next(name for name in names if not (folders / name).exists() and not _adapter_files(studio, name))
    quoted = partial(json.dumps, ensure_ascii=False)  # TOML knows no pairs of surrogates
    text = f"token = {quoted(token)}\nclass_word = {quoted(class_word)}\n"
    write_atomically(folders / name / SETTINGS_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    return name


def remove_concept(studio: Studio, name: str) -> None:
    """Move a concept and its adapter to the removed ones.

    Raises:
        InputError: it is being trained.
    """
    card = concept_card(studio, name)
    if card.job is not None and not card.job.state.ended:
        raise InputError(f"{card.token} is {card.job.state}; stop its training first.")
    put_away(studio, concept_folder(studio, name))
    for path in _adapter_files(studio, name):
        put_away(studio, path)
    shutil.rmtree(studio.folder("thumbnails") / name, ignore_errors=True)


def concepts_of_tokens(studio: Studio, tokens: Sequence[str]) -> dict[str, Path]:
    """Return the photo folders of those of `tokens` that are concepts here, by token."""
    folders = {token: studio.folder("concepts") / name for name, token in _tokens(studio).items()}
    return {token: folders[token] for token in tokens if token in folders and list_pictures(folders[token])}


def _words_of_base(studio: Studio) -> frozenset[str]:
    """Return the words of the chosen base; none while it was not looked at, when a training tells."""
    path = studio.root / WORDS
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return frozenset(known["words"] if known.get("chosen") == studio.settings.loading else ())


def _tokens(studio: Studio) -> dict[str, str]:
    """Return the tokens of the concepts whose settings can be read, by name."""
    tokens = {}
    for name in concept_names(studio):
        with suppress(InputError):
            tokens[name] = read_words(studio.folder("concepts") / name)[0]
    return tokens


def _taken_tokens(studio: Studio) -> list[str]:
    """Return the tokens of the concepts, and those of adapters that none of them wrote, as imported ones are."""
    return [*_tokens(studio).values(), *(token for card in adapter_cards(studio, ["adapters"]) for token in card.tokens)]


def _adapter_files(studio: Studio, name: str) -> list[Path]:
    folder = studio.folder("adapters")
    endings = (".safetensors", ".safetensors.checkpoint", ".band.json", "-samples")
    return [path for path in (folder / f"{name}{ending}" for ending in endings) if path.exists()]
