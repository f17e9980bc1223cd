"""PEFT's tuner layers in the trainer's loop: DoRA, AdaLoRA, OFT and VeRA as their authors maintain them.

PEFT wraps a bare dictionary of shells that share the layers' weights, so the base is not rebuilt around it; while a training
is under way each layer passes what it reads on to the tuner that wraps its shell.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spectral_diffusion.errors import InputError
from spectral_diffusion.joining import LowRank
from spectral_diffusion.parametrisations.budget import adalora_start

_NAME = "default"


@dataclass(frozen=True, kw_only=True)
class TunedLayers:
    """The `layers`, by key, whose shells a `tuner` of PEFT wraps; `rank` bounds the rank of each change, None for none."""

    tuner: nn.Module
    layers: dict[str, nn.Linear]
    method: str
    rank: int | None

    def wrapped(self, key: str) -> nn.Module:
        """Return the tuner's layer for layer `key`."""
        return self.tuner.model[_plain(key)]

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return what is trained in every layer, by name."""
        return {
            key: {name: tensor for name, tensor in self.wrapped(key).named_parameters() if tensor.requires_grad}
            for key in self.layers
        }

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While entered, every layer gives what its tuner gives."""
        with ExitStack() as stack:
            for key, layer in self.layers.items():
                layer.forward = self.wrapped(key).forward
                stack.callback(delattr, layer, "forward")
            yield

    def penalty(self) -> torch.Tensor | float:
        """Return AdaLoRA's term that keeps its singular vectors orthogonal; 0 for the others."""
        if self.method != "adalora":
            return 0.0
        weight = self.tuner.peft_config[_NAME].orth_reg_weight
        losses = []
        for key in self.layers:
            A, B = (getattr(self.wrapped(key), name)[_NAME] for name in ("lora_A", "lora_B"))
            for product in (A @ A.T, B.T @ B):
                losses.append((product - torch.eye(len(product), device=product.device)).norm())
        return weight * torch.stack(losses).mean()

    def after_step(self, step: int) -> None:
        """Let AdaLoRA move its budget between layers after step `step`, counted from 1, while the gradients are there."""
        if self.method == "adalora":
            for tensor in (tensor for own in self.tensors().values() for tensor in own.values()):
                if tensor.grad is None:  # of a layer that nothing reads, as SDXL's last one of its first text encoder
                    tensor.grad = torch.zeros_like(tensor)
            self.tuner.update_and_allocate(step)

    def memory(self) -> dict[str, Any]:
        """Return what the next step needs besides the tensors."""
        if self.method != "adalora":
            return {}
        allocator = self.tuner.rankallocator
        averages = {name: dict(getattr(allocator, name)) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
        return averages | {"rank_pattern": self.tuner.peft_config[_NAME].rank_pattern or {}}

    def recall(self, memory: dict[str, Any]) -> None:
        """Put back what `memory` returned, on the device of the tuner: checkpoints are read on the CPU."""
        device = next(self.tuner.parameters()).device
        for name in memory.keys() - {"rank_pattern"}:
            setattr(self.tuner.rankallocator, name, {key: tensor.to(device) for key, tensor in memory[name].items()})
        if memory:
            self.tuner.peft_config[_NAME].rank_pattern = memory["rank_pattern"]

    @torch.no_grad()
    def deltas(self) -> dict[str, LowRank]:
        """Return the change of every layer, on the CPU: thin factors where its rank is bounded, else one the identity."""
        return {key: self._delta(key) for key in self.layers}

    def _delta(self, key: str) -> LowRank:
        layer = self.wrapped(key)
        if self.rank is None:
            shell, weight = layer.base_layer, self.layers[key].weight
            shell.weight = _in_float32(weight)  # half precision would round the change away, and unmerging rounds too
            layer.merge()
            matrix = shell.weight - weight.float()
            layer.unmerge()
            shell.weight = weight
        else:
            matrix = layer.get_delta_weight(_NAME)
        rank = min(self.rank or min(matrix.shape), min(matrix.shape))
        U, s, Vh = torch.linalg.svd(matrix.cpu().double(), full_matrices=False)  # Apple's GPUs know no float64
        return LowRank(up=(U[:, :rank] * s[:rank]).float(), down=Vh[:rank].T.float().contiguous())


def _plain(key: str) -> str:
    return key.replace(".", "/")


def tuned_layers(method: str, layers: dict[str, nn.Linear], rank: int, steps: int, seed: int) -> TunedLayers:
    """Return `layers` wrapped by PEFT's `method`, one of `parametrisations.TUNERS`, without any change at the start.

    Args:
        rank: OFT's block size; for AdaLoRA the mean rank that it ends with.
        steps: of the whole training, which AdaLoRA's schedule needs.

    Raises:
        InputError: `rank` does not fit the method, or a layer is a convolution.
    """
    convolution = next((key for key, layer in layers.items() if isinstance(layer, nn.Conv2d)), None)
    if convolution is not None:
        raise InputError(f"{method} is for linear layers, '{convolution}' is a convolution; choose others as layers.")
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    config, bound = _configuration(method, layers, rank, steps)
    config.target_modules = [_plain(key) for key in layers]
    shells = nn.ModuleDict({_plain(key): _shell(layer) for key, layer in layers.items()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](shells, config, _NAME)
    tuned = TunedLayers(tuner=tuner, layers=layers, method=method, rank=bound)
    for key, layer in layers.items():
        tuned.wrapped(key).base_layer.weight = layer.weight
    return tuned


def _shell(layer: nn.Linear) -> nn.Linear:
    """Return another layer with the same weights, in float32: PEFT trains in the precision of what it wraps."""
    shell = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    shell.weight, shell.bias = _in_float32(layer.weight), layer.bias
    return shell


def _in_float32(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(torch.float32, copy=True), requires_grad=False)


def _configuration(method: str, layers: dict[str, nn.Linear], rank: int, steps: int) -> tuple[Any, int | None]:
    from peft import AdaLoraConfig, LoraConfig, OFTConfig, VeraConfig

    if method == "dora":
        return LoraConfig(r=rank, lora_alpha=rank, use_dora=True), None
    if method == "vera":
        return VeraConfig(r=rank, projection_prng_key=0), rank
    if method == "oft":
        odd = next((key for key, layer in layers.items() if layer.in_features % rank), None)
        if rank < 2 or odd is not None:
            raise InputError(f"For oft the rank is a block size of 2 or more that divides the width of every layer, got {rank}.")
        return OFTConfig(oft_block_size=rank), None
    if steps < 2:
        raise InputError(f"adalora needs steps to move its budget, got {steps}; give 2 or more.")
    start = adalora_start(rank)
    schedule = {"tinit": steps // 10, "tfinal": steps // 3, "deltaT": max(1, steps // 50), "total_step": steps}
    return AdaLoraConfig(init_r=start, target_r=rank, lora_alpha=start, **schedule), start
