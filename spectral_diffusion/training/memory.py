"""How a training fits a GPU: weights in half precision, parts out of the way, and as much at once as memory allows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from spectral_diffusion.bases.base import Base

logger = logging.getLogger(__name__)

USABLE = 0.9
"""Share of the free memory that is planned with; the rest is lost between blocks."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a batch goes through the UNet: in how many `parts`, and whether activations are computed again (`checkpointing`)."""

    parts: int = 1
    checkpointing: bool = False

    def smaller(self, samples: int) -> Plan:
        """Return the plan to fall back on when memory does not suffice for this one."""
        return Plan(parts=min(samples, 2 * self.parts), checkpointing=True)

    def __str__(self) -> str:
        parts = "in one pass" if self.parts == 1 else f"in {self.parts} passes"
        return f"each batch {parts}, {'with' if self.checkpointing else 'without'} gradient checkpointing"


def choose_plan(free: float, direct: float, checkpointed: float, samples: int) -> Plan:
    """Return the fastest plan that fits into `free` bytes.

    Args:
        direct, checkpointed: bytes that one sample of each concept takes, without and with checkpointing.
        samples: samples per concept in a batch.
    """
    for checkpointing, bytes_each in ((False, direct), (True, checkpointed)):
        for parts in range(1, samples + 1):
            if bytes_each * -(-samples // parts) <= USABLE * free:
                return Plan(parts=parts, checkpointing=checkpointing)
    return Plan(parts=samples, checkpointing=True)


def measured_plan(base: Base, one_pass: Callable[[Plan], None], samples: int) -> Plan:
    """Return the plan for a batch of `samples` per concept by what `one_pass` of one sample takes; on a CPU all at once."""
    if base.device.type != "cuda":
        return Plan()
    direct, checkpointed = (_peak(base.device, one_pass, checkpointing) for checkpointing in (False, True))
    free = _free(base.device)
    plan = choose_plan(free, direct, checkpointed, samples)
    logger.info("Of %.1f GB free on the GPU a sample takes %.2f GB: %s.", free / 1e9, direct / 1e9, plan)
    return plan


def _peak(device: torch.device, one_pass: Callable[[Plan], None], checkpointing: bool) -> float:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        one_pass(Plan(checkpointing=checkpointing))
    except torch.OutOfMemoryError:
        return float("inf")
    return float(torch.cuda.max_memory_allocated(device) - before)


def _free(device: torch.device) -> float:
    """Return the bytes that can still be had, within the share of the memory that this process was given."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - torch.cuda.memory_reserved(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(free, allowed) + unused


@contextmanager
def checkpointing(unet: nn.Module, on: bool) -> Iterator[None]:
    """While entered, the UNet computes activations again in the backward pass instead of keeping them, if `on`."""
    if not on:
        yield
        return
    unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()


@contextmanager
def lightened(base: Base) -> Iterator[None]:
    """While entered, a base on a GPU computes in bfloat16, and its autoencoder is on the CPU; afterwards it is as it was.

    Gradients in float16 would need their loss scaled.
    """
    if base.device.type == "cpu":
        yield
        return
    with elsewhere(base.pipeline.vae, torch.device("cpu")), in_bfloat16(base.pipeline.unet, *base.text_encoders.values()):
        yield


@contextmanager
def in_bfloat16(*models: nn.Module) -> Iterator[None]:
    """While entered, `models` are bfloat16, kernels channels last; their weights wait on the CPU and come back bit for bit."""
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    kept = [(tensor, tensor.data.cpu(), tensor.device) for tensor in tensors]
    try:
        for tensor in tensors:
            layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
            tensor.data = tensor.data.to(torch.bfloat16, memory_format=layout)
        yield
    finally:
        for tensor, whole, device in kept:
            tensor.data = whole.to(device)


@contextmanager
def elsewhere(module: nn.Module, device: torch.device) -> Iterator[None]:
    """While entered, `module` is on `device`."""
    before = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(before)
