"""Trainings of seconds, and how the tests compare what they end with."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import pytest
import torch

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.bases.base import Base
from spectral_diffusion.concepts.concept import Concept
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.training import TrainingProgress, TrainingSettings, train

BAND = Band(start=2, rank=2)
SHORT = TrainingSettings(
    steps=5, batch=1, inert_batch=1, rank=2, unet_rate=1e-2, text_encoder_rate=1e-2, isolation=4, checkpoint_every=2
)
FEWER = {
    ("training.loop", "INERT_SAMPLES"): 4,
    ("training.settling", "SAMPLES"): 4,
    ("training.inertness", "DRAWING_STEPS"): 2,
    ("training.examples", "CROPS_PER_PHOTO"): 2,
    ("training.scenes", "PICTURES"): 2,
    ("training.scenes", "DRAWING_STEPS"): 2,
    ("training.composed", "GROUPS"): 2,
    ("training.composed", "DRAWING_STEPS"): 2,
    ("training.activations", "PROMPTS"): ("{}", "a photo of {}"),
    ("training.activations", "DRAWING_STEPS"): 2,
}
"""Less preparation than a real training makes, so that the tests are quick."""


def prepare_less(patch: pytest.MonkeyPatch) -> None:
    for (module, name), value in FEWER.items():
        patch.setattr(import_module(f"spectral_diffusion.{module}"), name, value)


def follow_gradients(patch: pytest.MonkeyPatch) -> None:
    """Let AdamW move a number by its gradient where that is tiny, where it would follow the sign of what rounding left."""
    patch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-5))


def first_step(base: Base, concept: Concept, settings: TrainingSettings = SHORT) -> TrainingProgress:
    """Return what the first step of a training reports."""
    events: list[TrainingProgress] = []
    train(base, concept, BAND, settings, on_progress=events.append, should_stop=lambda: bool(events))
    return events[0]


def trained_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    (concept,) = adapter.concepts
    named = {f"{key}/{name}": t for key, part in concept.layers.items() for name, t in part.tensors.items()}
    return named | concept.embeddings | concept.activations


def assert_near(one: Adapter, other: Adapter) -> None:
    """Assert that the two learnt the same but for the order of float32 sums, which Adam magnifies where gradients are small."""
    measured = one.concepts[0].activations  # eigenvectors, of which the last are anything
    first, second = trained_tensors(one), trained_tensors(other)
    assert first.keys() == second.keys()
    for name in first.keys() - measured.keys():
        assert (first[name] - second[name]).norm() <= 1e-2 * second[name].norm().clamp(min=1e-6), name


def assert_bit_equal(one: Adapter, other: Adapter) -> None:
    first, second = trained_tensors(one), trained_tensors(other)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
