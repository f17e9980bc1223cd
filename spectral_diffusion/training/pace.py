"""What a training will take on this device, known before there is one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from spectral_diffusion.adapters.attach import Switch
from spectral_diffusion.bases.base import Base
from spectral_diffusion.prompts.conditioning import tokenize
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.training.batches import Pool, Shown
from spectral_diffusion.training.memory import lightened
from spectral_diffusion.training.run import Run
from spectral_diffusion.training.settings import TrainingSettings
from spectral_diffusion.training.trainable import build_trainable, class_word_vectors

_STEPS = 3  # of which the first, which is slower, does not count
_WORD = "dog"


def measure_pace(base: Base, settings: TrainingSettings, should_stop: Callable[[], bool] = lambda: False) -> float | None:
    """Return the seconds that one step of a concept with `settings` takes, or None when it was stopped before that was known.

    A few steps are made on nothing, in place of photos: what a step takes does not depend on what is shown. Nothing is kept.

    Raises:
        BandError: the base has no band of that rank.
        InputError: the settings do not fit the base.
        TrainingError: memory does not suffice.
    """
    vectors = class_word_vectors(base, _WORD)
    trainable = build_trainable(base, [_WORD], [Band(start=0, rank=settings.rank)], [vectors], settings)
    ended: list[float] = []
    with lightened(base):
        short = replace(settings, steps=_STEPS, sample_every=0)
        run = Run(base, trainable, short, [_nothing(base)], [], Switch(on=False), None)
        with trainable.adaptation.attached():
            run.loop(lambda progress: ended.append(time.monotonic()), should_stop)
    return (ended[-1] - ended[0]) / (_STEPS - 1) if run.finished else None


def _nothing(base: Base) -> Shown:
    """Return one empty picture, to learn and to stay inert on."""
    side = base.resolution // base.pipeline.vae_scale_factor
    empty = torch.zeros(1, base.pipeline.unet.config.in_channels, side, side, device=base.device)
    ids = tokenize(base, [_WORD])
    pool = Pool(noisy=empty, times=torch.zeros(1, dtype=torch.long, device=base.device), ids=ids, predictions=empty)
    return Shown(
        token=_WORD,
        class_word=_WORD,
        words=_WORD,
        ids=ids[:0, 0, 0],
        learnt=pool,
        pool=pool,
        pool_among=pool,
    )
