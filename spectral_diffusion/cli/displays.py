"""How long work looks while it runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from spectral_diffusion.cli.console import progress_bar

if TYPE_CHECKING:
    from spectral_diffusion.training import TrainingProgress


logger = logging.getLogger(__name__)

_PATIENCE = 2.0  # seconds
STOPPING = "Stopping after this step; press Ctrl-C again to leave at once."


def how_to_resume(done: int, steps: int, checkpoint: Path) -> int:
    """Say how a stopped training goes on; return the exit code."""
    words = "Stopped after step %d of %d, kept in '%s'; run the same command again to go on from there."
    logger.warning(words, done, steps, checkpoint)
    return 1


class CountDisplay:
    """Shows how many of something are done as a bar, from the first one on."""

    def __init__(self, what: str, unit: str):
        self.what, self.unit = what, unit
        self.bar: tqdm | None = None

    def show(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        if self.bar is None:
            self.bar = progress_bar(self.what, total, self.unit)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()


class StageDisplay:
    """Shows what is prepared or measured as a bar that goes when it is done, once a terminal was still for long enough to wonder.

    Stages that follow each other at once are one wait: many short ones leave it as still as a long one.
    """

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.began = self.heard = self.quiet_since = time.monotonic()

    def show(self, what: str, unit: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done; with none done another stage begins."""
        now = time.monotonic()
        if done == 0:
            self.began = now
            if now - self.heard > _PATIENCE:  # the terminal was another display's meanwhile
                self.quiet_since = now
        self.heard = now
        if done == 0 or done == total:
            self.close()
        elif self.bar is None and now - self.quiet_since > _PATIENCE:
            self.bar = progress_bar(what, total, unit, stays=False)
            self.bar.start_t -= now - self.began  # the pace is that from the beginning on
            self.bar.n = done
            self.bar.refresh()
        elif self.bar is not None:
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
            self.quiet_since = time.monotonic()


class TrainingDisplay:
    """Shows each training as a bar that begins where the training does, and keeps each concept's sample pictures in a folder."""

    def __init__(self, samples: Sequence[Path] = ()):
        self.samples = samples
        self.bar: tqdm | None = None

    def show(self, progress: TrainingProgress) -> None:
        """Show one step."""
        if self.bar is None:
            self.bar = progress_bar("training", progress.steps, "step", done=progress.step - 1)
        losses = {"loss": f"{progress.concept_loss:.3f}", "inertness": f"{progress.inertness_loss:.3f}"}
        self.bar.set_postfix(losses, refresh=False)
        self.bar.update(progress.step - self.bar.n)
        if progress.samples:
            from spectral_diffusion.generation.album import save_samples

            save_samples(progress.samples, progress.step, self.samples)
        if progress.step == progress.steps:
            self.close()

    def close(self) -> None:
        """Leave the bar as it is; the next step begins another."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
