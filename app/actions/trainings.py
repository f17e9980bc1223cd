"""Train concepts: queue trainings, and see how they go."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from app.actions.adapters import adapter_cards, adapter_path
from app.actions.concepts import concept_card, trained_by
from app.actions.studio import Studio, concept_names, loading_of
from app.jobs import Job
from spectral_diffusion.errors import InputError
from spectral_diffusion.training import PRESETS, TrainingSettings

FACTS = "base.json"
"""What the worker found out about the base, in the studio's folder."""
_OWN_FIELDS = ("steps", "sample_every", "checkpoint_every")
"""Settings that the page asks for by themselves, or not at all."""
_WORDS = {"yes": True, "no": False}


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a preset means here: optimiser steps, and the seconds and bytes that they are expected to take."""

    steps: int
    seconds: float
    memory: int


@dataclass(frozen=True, kw_only=True)
class TrainingView:
    """How a training goes: the losses by step, speed in steps per second, remaining seconds, sample pictures."""

    step: int
    steps: int
    losses: tuple[tuple[int, float], ...]
    speed: float | None
    remaining: float | None
    samples: tuple[Path, ...]


def look_at_base(studio: Studio) -> str | None:
    """Queue a job that loads the base and writes down what it is, unless that is known; return its name."""
    settings = asdict(studio.settings)
    looks = (job for job in studio.jobs.jobs() if job.kind == "look" and not job.state.ended)
    if base_facts(studio) is not None or any(is_chosen(studio, job.arguments["settings"]) for job in looks):
        return None
    return studio.jobs.submit("look", "Look at the base", {"settings": settings})


def is_chosen(studio: Studio, settings: Mapping[str, Any]) -> bool:
    """Tell whether what is loaded by `settings`, which may be of another time, is what is chosen now."""
    return loading_of(settings) == studio.settings.loading


def base_facts(studio: Studio) -> dict[str, Any] | None:
    """Return what is known of the chosen base: `family`, `resolution`, `directions`, `rank`, `device`, `predicts`, ..."""
    path = studio.root / FACTS
    facts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = facts.get("chosen") == studio.settings.loading and "rank" in facts  # the latest to be noted
    return facts if known else None


def unknown_base(studio: Studio) -> str:
    """Return in words why nothing is known of the chosen base, see `base_facts`."""
    looks = (job for job in studio.jobs.jobs() if job.kind == "look" and is_chosen(studio, job.arguments["settings"]))
    latest = next(looks, None)
    if latest is None or not latest.state.ended:
        return "The base is being looked at …"
    return latest.reason or "Looking at the base was stopped; “Keep” in the tab Settings begins again."


def expectations(studio: Studio) -> dict[str, Expectation]:
    """Return what each preset means on this device; nothing while the base was not looked at."""
    facts = base_facts(studio)
    if facts is None:
        return {}
    pace, memory = facts["seconds_per_step"], facts["memory"]
    return {name: Expectation(steps=steps, seconds=steps * pace, memory=memory) for name, steps in facts["presets"].items()}


def further_settings() -> dict[str, str]:
    """Return what each setting of a training means that can be given as text, by its name."""
    return {field.name: field.metadata["help"] for field in fields(TrainingSettings) if field.name not in _OWN_FIELDS}


def changes_from(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that `texts` write out, by name; an empty text leaves the preset's.

    Raises:
        InputError: a text is not of its setting's kind, or out of range; the setting is named.
    """
    kinds = {field.name: type(field.default) for field in fields(TrainingSettings)}
    changes = {name: _value(name, kinds[name], text.strip()) for name, text in texts.items() if text.strip()}
    TrainingSettings(**changes)
    return changes


def _value(name: str, kind: type, text: str) -> Any:
    try:
        if kind is bool:
            return _WORDS[text.lower()]
        return tuple(text.replace(",", " ").split()) if kind is tuple else kind(text)
    except (KeyError, ValueError) as error:
        wanted = {bool: "yes or no", int: "a whole number", float: "a number"}[kind]
        raise InputError(f"{name} must be {wanted}, got '{text}'; leave it empty for the preset's.") from error


def train(
    studio: Studio,
    name: str,
    preset: str = "fast",
    changes: dict[str, Any] | None = None,
    *,
    beside: Sequence[str] = (),
    apart_from: Sequence[str] = (),
    longer: bool = False,
) -> str:
    """Queue the training of the concept called `name` and return the job's name.

    Args:
        changes: settings that go before the preset's.
        beside: concepts to be trained in one go with it, and among one another.
        apart_from: adapters that it is not trained among, and whose bands it may get: those that it will never be drawn with.
        longer: go on from what they were trained to, on the bands that they have.

    Raises:
        InputError: one has no photos, is being trained, or is to be both beside and apart, or there is no such preset or adapter.
    """
    cards = [concept_card(studio, one) for one in dict.fromkeys([name, *beside])]
    strangers = {adapter_path(studio, one).stem for one in apart_from}
    if preset not in PRESETS:
        raise InputError(f"There is no preset '{preset}'; choose one of {', '.join(PRESETS)}.")
    for card in cards:
        if not card.photos:
            raise InputError(f"{card.token} has no photos; add five or six.")
        if card.job is not None and not card.job.state.ended:
            raise InputError(f"{card.token} is {card.job.state} already.")
        if card.name in strangers:
            raise InputError(f"{card.token} cannot be trained and be one that is never drawn with it; choose one of the two.")
    arguments = {
        "concepts": [card.name for card in cards],
        "preset": preset,
        "changes": changes or {},
        "longer": longer,
        "apart_from": list(apart_from),
        "settings": asdict(studio.settings),
    }
    return studio.jobs.submit("train", f"Train {' and '.join(card.token for card in cards)}", arguments)


def train_again(studio: Studio, name: str, *, longer: bool = False) -> str:
    """Queue the training of a concept once more with the settings of the last, and return the job's name.

    Args:
        longer: go on from what it was trained to, for as many more steps, with those that it was trained in one go with and
            apart from the same; else anew, by itself, among all, on a band that is free.

    Raises:
        InputError: it was never trained here, or is being trained.
    """
    last = concept_card(studio, name).job
    if last is None:
        raise InputError("It was not trained here yet; choose how long, then Train.")
    arguments = last.arguments
    if not longer:
        return train(studio, name, arguments["preset"], arguments["changes"])
    beside = [one for one in trained_by(last) if one in concept_names(studio)]
    still = [card.name for card in adapter_cards(studio, ["adapters"])]
    apart_from = [one for one in arguments.get("apart_from", ()) if one in still]
    return train(studio, name, arguments["preset"], arguments["changes"], beside=beside, apart_from=apart_from, longer=True)


def training_view(studio: Studio, job: Job, name: str) -> TrainingView:
    """Return how the training `job` goes or went, with the samples of the concept called `name`."""
    events = [event for event in studio.jobs.progress(job.name) if "step" in event]
    losses = {event["step"]: event["concept_loss"] for event in events}
    last = events[-1] if events else {}
    folder = studio.folder("thumbnails") / name / "samples"
    samples = [folder / file for event in events for file in event.get("samples", {}).get(name, ())]
    return TrainingView(
        step=last.get("step", 0),
        steps=last.get("steps", 0),
        losses=tuple(sorted(losses.items())),
        speed=last.get("speed"),
        remaining=last.get("remaining"),
        samples=tuple(path for path in samples if path.is_file())[-6:],
    )
