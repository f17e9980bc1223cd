"""The whole tour on two concepts: train, fuse, draw together, export."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from app.actions.adapters import free_fused_name
from app.actions.concepts import SAMPLES, concept_card
from app.actions.pictures import drawing_record
from app.actions.studio import Studio, concept_names
from app.actions.trainings import train
from spectral_diffusion.errors import InputError
from spectral_diffusion.generation.drawing import Drawing, random_seed

TOGETHER = "{} and {} near a lake"


def queue_tour(studio: Studio, preset: str = "fast", changes: dict[str, Any] | None = None) -> list[str]:
    """Queue the tour on the first two sample concepts and return the jobs' names; trained concepts are not trained again.

    Raises:
        InputError: a sample concept was removed.
    """
    names = SAMPLES[:2]
    missing = [name for name in names if name not in concept_names(studio)]
    if missing:
        raise InputError(f"The sample concept '{missing[0]}' was removed; train and fuse concepts of your own.")
    cards = [concept_card(studio, name) for name in names]
    untrained = [card.name for card in cards if card.adapter is None and (card.job is None or card.job.state.ended)]
    jobs = [train(studio, untrained[0], preset, changes, beside=untrained[1:])] if untrained else []
    settings, out = asdict(studio.settings), f"{free_fused_name(studio, 'tour')}.safetensors"
    fused = f"fused/{out}"
    arguments = {
        "adapters": [f"adapters/{name}.safetensors" for name in names],
        "strengths": [1.0, 1.0],
        "method": None,
        "allow_overlap": False,
        "out": out,
    }
    jobs.append(studio.jobs.submit("fuse", f"Fuse {cards[0].token} and {cards[1].token}", arguments))
    drawing = Drawing(prompt=TOGETHER.format(*(card.token for card in cards)), count=4, seed=random_seed())
    arguments = {"adapter": fused, "drawing": drawing_record(drawing), "whole": False, "settings": settings}
    jobs.append(studio.jobs.submit("generate", f"Draw {drawing.prompt}", arguments))
    how = {"precision": "fp16", "format": "kohya", "rank": None}
    arguments = {"adapter": fused, **how, "settings": settings, "out": "tour.zip"}
    jobs.append(studio.jobs.submit("export", "Export tour", arguments))
    return jobs
