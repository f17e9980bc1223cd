"""The training loop: photos of one concept in, an adapter out."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from spectral_diffusion.activations import measure_activations
from spectral_diffusion.adapter import Adapter, ConceptPart, token_words
from spectral_diffusion.attach import attached, check_new_token, with_tokens
from spectral_diffusion.bands import Band
from spectral_diffusion.base import Base
from spectral_diffusion.concept import Concept
from spectral_diffusion.conditioning import encode, prompts, tokenize
from spectral_diffusion.errors import TrainingError
from spectral_diffusion.parametrisations import BANDED
from spectral_diffusion.training.checkpoint import load_checkpoint, save_checkpoint
from spectral_diffusion.training.examples import EncodedExamples, encode_examples
from spectral_diffusion.training.inertness import InertPool, build_inert_pool, stranger_vectors
from spectral_diffusion.training.settings import TrainingSettings
from spectral_diffusion.training.trainable import Trainable, build_trainable, class_word_vectors

logger = logging.getLogger(__name__)

INERT_SAMPLES = 512


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """How far a training is: losses of this step, speed in steps per second, remaining seconds, sample pictures if any."""

    step: int
    steps: int
    concept_loss: float
    inertness_loss: float
    steps_per_second: float
    remaining_seconds: float
    samples: tuple[Image.Image, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The trained `adapter`; `finished` is false when the training was stopped before its last step."""

    adapter: Adapter
    steps_done: int
    finished: bool
    seconds: float


def train(
    base: Base,
    concept: Concept,
    band: Band,
    settings: TrainingSettings,
    *,
    checkpoint: Path | None = None,
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train one concept on its band of the base's singular directions.

    Args:
        checkpoint: where the state is kept every `settings.checkpoint_every` steps; a run of the same photos, base and
            settings goes on from it and ends as an undisturbed run does. It stays; remove it once the adapter is saved.
        on_progress: called after every step.
        should_stop: asked before every step; when it says true the state is kept and what was trained so far returned.

    Raises:
        InputError: the token is a word of the base, or the settings do not fit it.
        TrainingError: the loss is not a number; the last good state is in `checkpoint`.
    """
    check_new_token(base, concept.token)
    class_vectors = class_word_vectors(base, concept.class_word)
    trainable = build_trainable(base, band, class_vectors, settings)
    examples = encode_examples(base, concept, settings.seed)
    strangers = stranger_vectors(base, class_vectors, settings.seed)
    with with_tokens(base, {concept.token: trainable.embeddings} | strangers):
        pool = build_inert_pool(base, concept.class_word, INERT_SAMPLES, settings.seed)
        run = _Run(base, concept, trainable, settings, examples, pool, checkpoint)
        with trainable.adaptation.attached():
            run.loop(on_progress, should_stop)
    trained, finished = trainable.adaptation.result(), run.step == settings.steps
    part = ConceptPart(
        token=concept.token,
        class_word=concept.class_word,
        band=band if settings.parametrisation in BANDED else None,
        parametrisation=trained.form,
        embeddings={part: vectors.detach().cpu().clone() for part, vectors in trainable.embeddings.items()},
        layers=trained.parts,
        settings=asdict(settings) | {"steps_done": run.step, "parameters": trainable.parameter_count()},
    )
    adapter = Adapter(family=base.family, fingerprint=base.fingerprint, concepts=(part,), weights=(1.0,))
    if finished:
        with attached(base, adapter):
            activations = measure_activations(base, run.words, adapter.layer_keys(), settings.seed)
        adapter = replace(adapter, concepts=(replace(part, activations=activations),))
    return TrainingResult(adapter=adapter, steps_done=run.step, finished=finished, seconds=run.seconds)


def _words(token: str, settings: TrainingSettings) -> str:
    return token_words(token, settings.token_vectors)


class _Run:
    """One training under way: the optimiser, the step it is at, and its checkpoint."""

    def __init__(
        self,
        base: Base,
        concept: Concept,
        trainable: Trainable,
        settings: TrainingSettings,
        examples: EncodedExamples,
        pool: InertPool,
        checkpoint: Path | None,
    ):
        self.base, self.trainable, self.settings = base, trainable, settings
        self.examples, self.pool, self.checkpoint = examples, pool, checkpoint
        self.accelerator = Accelerator(
            cpu=base.device.type == "cpu", mixed_precision="bf16" if base.device.type == "cuda" else "no"
        )
        self.optimizer = torch.optim.AdamW(
            [
                {"params": trainable.parameters("unet"), "rate": settings.unet_rate},
                {"params": trainable.parameters("text_encoder"), "rate": settings.text_encoder_rate},
                {"params": list(trainable.embeddings.values()), "rate": settings.token_rate, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.999),
            weight_decay=settings.weight_decay,
        )
        self.words = _words(concept.token, settings)
        self.caption_ids = tokenize(base, [text.replace(concept.token, self.words) for text in examples.captions])
        self.step, self.seconds = 0, 0.0
        self.good: dict[str, Any] | None = None
        self.name = self._digest(concept)
        self._resume()

    def _digest(self, concept: Concept) -> str:
        digest = hashlib.sha256()
        outcome = asdict(self.settings) | {"checkpoint_every": None, "sample_every": None}
        digest.update(json.dumps([outcome, concept.token, concept.class_word, self.base.fingerprint]).encode())
        digest.update(json.dumps([self.examples.captions, list(self.trainable.embeddings)]).encode())
        digest.update(self.examples.latents.cpu().numpy().tobytes())
        digest.update(self.examples.masks.cpu().numpy().tobytes())
        digest.update(self.trainable.adaptation.fixed.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _resume(self) -> None:
        state = load_checkpoint(self.checkpoint, self.name) if self.checkpoint else None
        if state is None:
            return
        self.trainable.load(state["trainable"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        logger.info("The training goes on from step %d.", self.step)

    def _state(self) -> dict[str, Any]:
        return {
            "trainable": self.trainable.state(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "step": self.step,
            "seconds": self.seconds,
        }

    def _save(self) -> None:
        if self.checkpoint is not None:
            save_checkpoint(self.checkpoint, self.name, self._state())

    def loop(self, on_progress: Callable[[TrainingProgress], None], should_stop: Callable[[], bool]) -> None:
        """Run all steps that remain."""
        steps, started_at, started = self.settings.steps, self.step, time.monotonic()
        before = self.seconds
        while self.step < steps and not should_stop():
            concept_loss, inertness_loss = self._one_step()
            self.seconds = before + time.monotonic() - started
            speed = (self.step - started_at) / max(time.monotonic() - started, 1e-6)
            if self.step % self.settings.checkpoint_every == 0 and self.step < steps:
                self._save()
            on_progress(
                TrainingProgress(
                    step=self.step,
                    steps=steps,
                    concept_loss=concept_loss,
                    inertness_loss=inertness_loss,
                    steps_per_second=speed,
                    remaining_seconds=(steps - self.step) / speed,
                    samples=self._samples(),
                )
            )
        if self.step < steps:
            self._save()

    def _one_step(self) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * (1 - self.step / self.settings.steps)
        self.optimizer.zero_grad(set_to_none=True)
        with self.accelerator.autocast():
            concept_loss, inertness_loss = self._losses(generator)
        loss = concept_loss + self.settings.inertness * inertness_loss + self.trainable.adaptation.penalty()
        if not torch.isfinite(loss):
            self._fail("the loss is not a number")
        self.accelerator.backward(loss)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if not torch.isfinite(self.accelerator.clip_grad_norm_(parameters, self.settings.gradient_norm)):
            self._fail("the gradient is not a number")
        self.good = self._state()
        self.optimizer.step()
        self.step += 1
        self.trainable.adaptation.after_step(self.step)
        return concept_loss.item(), inertness_loss.item()

    def _losses(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the concept's masked denoising loss and the inertness loss, from one forward pass over both halves."""
        batch, examples, pool = self.settings.batch, self.examples, self.pool
        scheduler = self.base.pipeline.scheduler
        chosen = torch.randint(len(examples.latents), (batch,), generator=generator)
        clean, masks = examples.latents[chosen], examples.masks[chosen]
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        times = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator).to(clean.device)
        noisy, ids = scheduler.add_noise(clean, noise, times), self.caption_ids[chosen]
        inert = torch.randint(len(pool.noisy), (batch,), generator=generator)
        if self.settings.inertness:
            noisy, ids = torch.cat([noisy, pool.noisy[inert]]), torch.cat([ids, pool.ids[inert]])
            times = torch.cat([times, pool.times[inert]])
        predicted = self.base.pipeline.unet(noisy, times, **encode(self.base, ids)).sample.float()
        target = _target(scheduler, clean, noise, times[:batch])
        weights = masks + (1 - masks) * self.settings.background
        masked = ((predicted[:batch] - target) ** 2 * weights).mean()
        concept_loss = masked / weights.mean().clamp(min=1e-6)  # a crop beside the mask weighs nothing
        if not self.settings.inertness:
            return concept_loss, concept_loss.new_zeros(())
        return concept_loss, ((predicted[batch:] - pool.predictions[inert]) ** 2).mean()

    def _samples(self) -> tuple[Image.Image, ...]:
        every = self.settings.sample_every
        if not every or self.step % every:
            return ()
        with torch.no_grad():
            drawn = self.base.pipeline(
                **prompts(self.base, [f"a photo of {self.words}"] * 2),
                num_inference_steps=15,
                height=self.base.resolution,
                width=self.base.resolution,
                generator=torch.Generator().manual_seed(self.settings.seed),
            )
        return tuple(drawn.images)

    def _fail(self, what: str) -> None:
        kept = ""
        if self.checkpoint is not None and self.good is not None:
            save_checkpoint(self.checkpoint, self.name, self.good)
            kept = f" The last good state, of step {self.good['step']}, is kept in '{self.checkpoint}'."
        raise TrainingError(
            f"The training stopped at step {self.step}: {what}.{kept} Lower the learning rates, or look for a damaged photo."
        )


def _target(scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Return what the base was trained to predict: the noise, or the velocity."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(clean, noise, times)
    return noise
