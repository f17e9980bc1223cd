"""One resumable stage of training: a loop over steps that survives being killed."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


def learning_rate(step: int, total: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def train_stage(
    folder: Path,
    name: str,
    models: dict[str, torch.nn.Module],
    loss_of_step: Callable[[int, torch.Generator], torch.Tensor],
    *,
    steps: int,
    peak_rate: float,
    weight_decay: float = 0.01,
    ema_decay: float | None = None,
    every: Callable[[int], None] | None = None,
    every_seconds: float = 120.0,
) -> None:
    """Train `models` in place for `steps` optimiser steps, resuming from `folder/NAME.state` when it exists.

    On a GPU the loss is computed in bfloat16, the weights stay in float32.

    Args:
        models: what is trained; at the end they hold the averaged weights when `ema_decay` is given.
        loss_of_step: step number and a generator seeded by it -> scalar loss. All randomness comes from the generator.
        ema_decay: decay of the exponential moving average of the weights.
        every: called with the step number whenever the state was saved (to draw sample sheets).
    """
    state_file, done_file = folder / f"{name}.state", folder / f"{name}.done"
    parameters = [parameter for model in models.values() for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    average = [parameter.detach().clone() for parameter in parameters] if ema_decay else None
    step, seconds = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        for key, model in models.items():
            model.load_state_dict(state["models"][key])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        if average is not None:
            average = [tensor.to(device) for tensor in state["average"]]

    def save() -> None:
        torch.save(
            {
                "models": {key: model.state_dict() for key, model in models.items()},
                "optimizer": optimizer.state_dict(),
                "average": average,
                "step": step,
                "seconds": seconds,
            },
            f"{state_file}.part",
        )
        os.replace(f"{state_file}.part", state_file)

    last_save, last_log, losses = time.monotonic(), time.monotonic(), []
    while step < steps:
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_rate)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of_step(step, torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if average is not None:
            decay = min(ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
        losses.append(loss.detach())
        seconds += time.monotonic() - started
        if time.monotonic() - last_log > 20:
            mean = torch.stack(losses).mean().item()
            remaining = seconds / step * (steps - step) / 60
            logger.info("%s step %d/%d loss %.4f, %.1f min left", name, step, steps, mean, remaining)
            last_log, losses = time.monotonic(), []
        if time.monotonic() - last_save > every_seconds or step == steps:
            save()
            if every is not None:
                with _weights(parameters, average):
                    every(step)
            last_save = time.monotonic()
    if average is not None:
        with torch.no_grad():
            for parameter, mean_value in zip(parameters, average, strict=True):
                parameter.copy_(mean_value)
    done_file.write_text(json.dumps({"steps": steps, "seconds": round(seconds)}))


class _weights:
    """While entered, `parameters` hold the averaged weights."""

    def __init__(self, parameters: list[torch.nn.Parameter], average: list[torch.Tensor] | None):
        self.parameters, self.average = parameters, average

    def _swap(self) -> None:
        if self.average is None:
            return
        with torch.no_grad():
            for parameter, mean_value in zip(self.parameters, self.average, strict=True):
                kept = parameter.detach().clone()
                parameter.copy_(mean_value)
                mean_value.copy_(kept)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *exception: object) -> None:
        self._swap()
