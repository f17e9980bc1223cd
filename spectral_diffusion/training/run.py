"""One training under way: steps, losses, checkpoints."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image

from spectral_diffusion.adapters.adapter import ConceptPart
from spectral_diffusion.adapters.attach import Switch
from spectral_diffusion.bases.base import Base
from spectral_diffusion.errors import TrainingError
from spectral_diffusion.generation.latents import draw_latents
from spectral_diffusion.prompts.conditioning import prompts
from spectral_diffusion.training.activations import measure_activations
from spectral_diffusion.training.attention import CrossAttention
from spectral_diffusion.training.batches import Batch, Shown, draw_batch
from spectral_diffusion.training.checkpoint import load_checkpoint, save_checkpoint
from spectral_diffusion.training.memory import Plan, checkpointing, elsewhere, measured_plan
from spectral_diffusion.training.prediction import predict
from spectral_diffusion.training.settings import TrainingSettings
from spectral_diffusion.training.trainable import Trainable

logger = logging.getLogger(__name__)

_SAMPLE_STEPS = 15
READ_EVERY = 10
"""Steps on a GPU between two looks at the losses, each of which makes the program wait for the GPU; and between two states that
are kept for a loss that is no number, which stays so."""


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """How far a training is: losses of this step, speed in steps per second, remaining seconds, sample pictures if any.

    With several concepts the losses are means over them, and the samples stand in their order, as many of each.
    """

    step: int
    steps: int
    concept_loss: float
    inertness_loss: float
    steps_per_second: float
    remaining_seconds: float
    samples: tuple[Image.Image, ...] = ()


class Run:
    """The optimiser, the step it is at, and the checkpoint of a training of one concept or several."""

    def __init__(
        self,
        base: Base,
        trainable: Trainable,
        settings: TrainingSettings,
        concepts: Sequence[Shown],
        neighbours: Sequence[tuple[ConceptPart, float]],
        others: Switch,
        checkpoint: Path | None,
    ):
        self.base, self.trainable, self.settings, self.concepts = base, trainable, settings, concepts
        self.neighbours, self.others, self.checkpoint = neighbours, others, checkpoint
        self.optimizer = torch.optim.AdamW(
            [
                {"params": trainable.parameters("unet"), "rate": settings.unet_rate},
                {"params": trainable.parameters("text_encoder"), "rate": settings.text_encoder_rate},
                {
                    "params": [vectors for own in trainable.embeddings for vectors in own.values()],
                    "rate": settings.token_rate,
                    "weight_decay": 0.0,
                },
            ],
            betas=(0.9, 0.999),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.samples_each = settings.batch + (settings.inert_batch if settings.inertness else 0)
        self.plan, self.fell_back = Plan(), False
        self.seen: CrossAttention | None = None
        self.step, self.seconds = 0, 0.0
        self.good: dict[str, Any] | None = None
        self.name = self._digest()
        self._resume()

    @property
    def finished(self) -> bool:
        """Whether the last step was made."""
        return self.step == self.settings.steps

    def _digest(self) -> str:
        outcome = asdict(self.settings) | {"checkpoint_every": None, "sample_every": None}
        base = [self.base.fingerprint, self.base.prediction_type, list(self.base.text_encoders)]
        digest = hashlib.sha256(json.dumps([outcome, base]).encode())
        for other, weight in self.neighbours:
            digest.update(json.dumps([other.token, weight]).encode())
            for tensors in (other.embeddings, *(part.tensors for part in other.layers.values())):
                for tensor in tensors.values():
                    digest.update(tensor.cpu().numpy().tobytes())
        for concept in self.concepts:
            digest.update(json.dumps([concept.token, concept.class_word, concept.words]).encode())
            for tensor in concept.learnt.identity():
                digest.update(tensor.cpu().numpy().tobytes())
        digest.update(self.trainable.adaptation.fixed.cpu().numpy().tobytes())
        for tensor in self.trainable.named().values():
            digest.update(tensor.detach().cpu().numpy().tobytes())
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
            "optimizer": _copied(self.optimizer.state_dict()),
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
        self.plan = measured_plan(self.base, self._trial, self.samples_each)
        while self.step < steps and not should_stop():
            losses = self._one_step()
            self.seconds = before + time.monotonic() - started
            if self.step % self.settings.checkpoint_every == 0 and self.step < steps:
                self._save()
            if losses is not None:
                speed = (self.step - started_at) / max(time.monotonic() - started, 1e-6)
                on_progress(
                    TrainingProgress(
                        step=self.step,
                        steps=steps,
                        concept_loss=losses[0],
                        inertness_loss=losses[1],
                        steps_per_second=speed,
                        remaining_seconds=(steps - self.step) / speed,
                        samples=self._samples(),
                    )
                )
        self._save()  # after the last step too: what is measured then can be stopped

    def _one_step(self) -> tuple[float, float] | None:
        """Make one step; return its losses where they are looked at."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * (1 - self.step / self.settings.steps)
        losses = self._backward(self._batch(self.step))
        gradients = [self.trainable.gradients(number) for number in range(len(self.concepts))]
        norms = [torch.nn.utils.get_total_norm(own) for own in gradients]
        for own, norm in zip(gradients, norms, strict=True):
            torch._foreach_mul_(own, (self.settings.gradient_norm / (norm + 1e-6)).clamp(max=1.0))
        read = self._read(losses, norms) if self._looks() else None
        if self.settings.token_norm:
            self.trainable.stop_tokens(self.settings.token_norm)
        self.optimizer.step()
        self.step += 1
        self.trainable.adaptation.after_step(self.step)
        return read

    def _batch(self, step: int) -> Batch:
        return draw_batch(self.base, self.concepts, self.settings, step, among=self._is_among(step))

    def _is_among(self, step: int) -> bool:
        """Tell whether step number `step`, counted from 0, is made among the others: the first and then every so many."""
        share = self.settings.presence
        return math.ceil((step + 1) * share) > math.ceil(step * share)

    def _looks(self) -> bool:
        """Tell whether the losses of this step are looked at."""
        if self.base.device.type == "cpu":
            return True
        number, sampling = self.step + 1, self.settings.sample_every
        return number in (1, self.settings.steps) or number % READ_EVERY == 0 or bool(sampling and number % sampling == 0)

    def _read(self, losses: torch.Tensor, norms: list[torch.Tensor]) -> tuple[float, float]:
        """Return the mean losses and, every `READ_EVERY` steps, keep the state if all is well: copying it takes its time."""
        concept_loss, inertness_loss, norm = torch.cat([losses, torch.stack(norms)[:, None]], dim=1).mean(0).tolist()
        if not math.isfinite(concept_loss + inertness_loss):
            self._fail("the loss is not a number")
        if not math.isfinite(norm):
            self._fail("the gradient is not a number")
        if self.good is None or self.step >= self.good["step"] + READ_EVERY - 1:
            self.good = self._state()
        return concept_loss, inertness_loss

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Put the batch's gradients into place and return its losses, in smaller parts if memory asks for it, once."""
        try:
            return self._passes(batch, self.plan)
        except torch.OutOfMemoryError as error:
            if self.fell_back:
                raise TrainingError(
                    f"Memory does not suffice for {self.plan} either; choose a smaller batch, or close what else uses the GPU."
                ) from error
        self.plan, self.fell_back = self.plan.smaller(self.samples_each), True  # here, what the failed pass held is free again
        logger.warning("Memory did not suffice; the training goes on with %s.", self.plan)
        torch.cuda.empty_cache()
        return self._backward(batch)

    def _passes(self, batch: Batch, plan: Plan) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        self.others.on = batch.among  # until the backward pass is over, which may run the layers again
        with checkpointing(self.base.pipeline.unet, plan.checkpointing):
            for number in range(plan.parts):
                of_part = self._losses(batch.part(number, plan.parts))
                loss = (of_part[:, 0] + self.settings.inertness * of_part[:, 1]).sum()
                (loss + self.trainable.adaptation.penalty() / plan.parts).backward()
                losses.append(of_part.detach())
        self.others.on = False
        return torch.stack(losses).sum(0)

    def _losses(self, batch: Batch) -> torch.Tensor:
        """Return each concept's loss and its inertness loss, `(concepts, 2)`, from one forward pass.

        A concept's loss is the masked denoising loss, and the share of its token's attention outside the mask where that counts.
        """
        company = batch.company.flatten(0, 1) if batch.among else None
        self.trainable.adaptation.show(self.base.pipeline.unet.dtype, company=company)
        inputs = (tensor.flatten(0, 1) for tensor in (batch.noisy, batch.times, batch.ids))
        with self.seen.watched() if self.seen else nullcontext():
            predicted = predict(self.base, *inputs).view(batch.targets.shape)
            distances = predicted - batch.targets
            errors = (distances**2 * batch.weights).mean((2, 3, 4)) + (distances * batch.directions).mean((2, 3, 4)) ** 2
            if self.seen:
                outside = self.seen.outside(batch.tokens.flatten(0, 1), batch.places.flatten(0, 1))
                errors = errors + self.settings.attention * outside.view(errors.shape)
        return (errors[..., None] * batch.shares).sum(1)

    def _trial(self, plan: Plan) -> None:
        """Make a pass with one sample of each concept, to see what it takes."""
        self._passes(self._batch(0).part(0, self.samples_each), plan)
        self.optimizer.zero_grad(set_to_none=True)

    def activations(self) -> list[dict[str, torch.Tensor]]:
        """Return what each concept's model feeds into its layers while it draws, once it is trained to the end."""
        if not self.finished:
            return [{} for _ in self.concepts]
        measured = []
        for number, concept in enumerate(self.concepts):
            self.trainable.adaptation.show(self.base.pipeline.unet.dtype, number)
            measured.append(
                measure_activations(self.base, concept.words, tuple(self.trainable.adaptation.layers), self.settings.seed)
            )
        return measured

    @torch.no_grad()
    def _samples(self) -> tuple[Image.Image, ...]:
        every = self.settings.sample_every
        if not every or self.step % every:
            return ()
        pipeline, vae, images = self.base.pipeline, self.base.pipeline.vae, []
        with elsewhere(vae, self.base.device):
            for number, concept in enumerate(self.concepts):
                self.trainable.adaptation.show(pipeline.unet.dtype, number)
                texts = prompts(self.base, [f"a photo of {concept.words}"] * 2)
                generator = torch.Generator().manual_seed(self.settings.seed)
                latents = draw_latents(self.base, texts, _SAMPLE_STEPS, self.base.guidance, generator=generator)
                pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
                images += pipeline.image_processor.postprocess(pixels)
        return tuple(images)

    def _fail(self, what: str) -> NoReturn:
        kept = ""
        if self.checkpoint is not None and self.good is not None:
            save_checkpoint(self.checkpoint, self.name, self.good)
            kept = f" The last good state, of step {self.good['step']}, is kept in '{self.checkpoint}'."
        raise TrainingError(
            f"The training stopped at step {self.step}: {what}.{kept} Lower the learning rates, or look for a damaged photo."
        )


def _copied(state: Any) -> Any:
    """Return a copy of an optimiser's state; `copy.deepcopy` takes as long as the optimiser's step."""
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {name: _copied(value) for name, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else state
