"""The training methods that `benchmarks.speed` compares, each on the same frozen UNet and text encoder.

A method is a context manager: while entered, its change of the layers is in place, and it yields what one step needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.spectra.spectrum import Spectrum
from spectral_diffusion.training import TrainingSettings
from spectral_diffusion.training.adaptation import adapt


@dataclass(frozen=True, kw_only=True)
class Models:
    """A frozen base: the UNet, the text encoder, and their linear layers that are adapted, by layer key."""

    unet: nn.Module
    text_encoder: nn.Module
    layers: dict[str, nn.Linear]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What one step needs of a method.

    Attributes:
        parameters: what the optimiser moves; empty for the frozen base.
        before: called before each forward pass.
        after: called after each optimiser step with its number.
        as_published: whether the step is that of diffusers' example: autocast, unfused AdamW, the loss read every time.
        trains_text: whether the text encoder is adapted.
    """

    parameters: list[torch.Tensor]
    before: Callable[[], None] = lambda: None
    after: Callable[[int], None] = lambda step: None
    as_published: bool = False
    trains_text: bool = field(default=True)


@contextmanager
def frozen(models: Models, rank: int) -> Iterator[Method]:
    """The floor: the base alone, its activations' gradients taken as if the text were trained."""
    yield Method(parameters=[])


def spectral(form: str, concepts: int = 1) -> Callable[[Models, int], Iterator[Method]]:
    """Return the product's own step in parametrisation `form`, of as many concepts in one pass."""

    @contextmanager
    def method(models: Models, rank: int) -> Iterator[Method]:
        settings = TrainingSettings(parametrisation=form, rank=rank)
        reserved = settings.isolation * rank
        spectra = {key: random_spectrum(layer, reserved) for key, layer in models.layers.items()}
        bands = [Band(start=number * rank, rank=rank) for number in range(concepts)]
        adaptation = adapt(models.layers, spectra, [str(band) for band in bands], bands, settings)
        dtype = next(models.unet.parameters()).dtype
        with adaptation.attached():
            parameters = list(adaptation.named().values())
            yield Method(parameters=parameters, before=lambda: adaptation.show(dtype), after=adaptation.after_step)

    return method


def random_spectrum(layer: nn.Linear, count: int) -> Spectrum:
    """Return random directions of a layer's shape: neither time nor memory depend on which they are."""
    sides, device = layer.weight.shape, layer.weight.device
    count = min(count, *sides)
    U, V = (torch.randn(side, count, device=device) / side**0.5 for side in sides)
    return Spectrum(U=U, s=torch.linspace(2, 1, count, device=device), V=V)


@contextmanager
def peft_lora(models: Models, rank: int) -> Iterator[Method]:
    """LoRA through PEFT on the same layers: as many numbers as the additive form, less one per direction."""
    with _swapped(models, _injected(models, models.layers, rank)) as parameters:
        yield Method(parameters=parameters)


@contextmanager
def dreambooth_lora(models: Models, rank: int) -> Iterator[Method]:
    """The step of diffusers' DreamBooth-LoRA example: PEFT on the UNet's attention, the text encoder frozen."""
    layers = {key: layer for key, layer in models.layers.items() if key.startswith("unet")}
    with _swapped(models, _injected(models, layers, rank)) as parameters:
        yield Method(parameters=parameters, as_published=True, trains_text=False)


@contextmanager
def dense(models: Models, rank: int) -> Iterator[Method]:
    """The additive form as published: `U`, `s`, `V` whole, and the weight built from them in every forward pass."""
    with _swapped(models, {key: DenseSpectral(layer, rank) for key, layer in models.layers.items()}) as parameters:
        yield Method(parameters=parameters)


class DenseSpectral(nn.Module):
    """A linear layer that builds `(U + A) diag(s + c) (V + B)^T` anew each time, `A`, `B`, `c` filled up with zeros."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        whole = min(layer.weight.shape)
        weight = layer.weight
        self.bias = layer.bias
        self.register_buffer("U", torch.full((weight.shape[0], whole), weight.shape[0] ** -0.5).to(weight))
        self.register_buffer("s", torch.ones(whole).to(weight))
        self.register_buffer("V", torch.full((weight.shape[1], whole), weight.shape[1] ** -0.5).to(weight))
        zeros = {"A": (weight.shape[0], rank), "B": (weight.shape[1], rank), "c": (rank,)}
        for name, shape in zeros.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, device=weight.device)))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return the layer's output."""
        missing = (0, len(self.s) - len(self.c))
        A, B, c = (nn.functional.pad(tensor.to(values.dtype), missing) for tensor in (self.A, self.B, self.c))
        return nn.functional.linear(values, (self.U + A) * (self.s + c) @ (self.V + B).T, self.bias)


def _injected(models: Models, layers: dict[str, nn.Linear], rank: int) -> dict[str, nn.Module]:
    """Return PEFT's LoRA module for each layer, made one by one so that the models stay as they are.

    What is trained lies in float32 and is multiplied in the layer's own precision, as the product does it: by itself PEFT would
    multiply in float32, which is slower on a GPU and no part of the method.
    """
    made = {}
    for key, layer in layers.items():
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=["layer"])
        made[key] = inject_adapter_in_model(config, nn.ModuleDict({"layer": layer}))["layer"]
        for name, parameter in made[key].named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float().requires_grad_(True)
        made[key].cast_input_dtype_enabled = False
        made[key].forward = _autocast(made[key].forward)
    return made


def _autocast(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def in_its_own_precision(values: torch.Tensor) -> torch.Tensor:
        with torch.autocast(values.device.type, values.dtype, enabled=values.dtype != torch.float32):
            return forward(values)

    return in_its_own_precision


@contextmanager
def _swapped(models: Models, modules: dict[str, nn.Module]) -> Iterator[list[torch.Tensor]]:
    """While entered, `modules` stand in place of the layers; yields what is trained in them."""
    of = {layer: key for key, layer in models.layers.items() if key in modules}
    places = [
        (parent, name, child)
        for model in (models.unet, models.text_encoder)
        for parent in list(model.modules())
        for name, child in list(parent.named_children())
        if child in of
    ]
    try:
        for parent, name, child in places:
            setattr(parent, name, modules[of[child]])
        own = {id(parameter) for layer in of for parameter in layer.parameters()}
        yield [p for module in modules.values() for p in module.parameters() if p.requires_grad and id(p) not in own]
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


METHODS = {
    "frozen": frozen,
    "additive": spectral("additive"),
    "rotational": spectral("rotational"),
    "peft_lora": peft_lora,
    "dense": dense,
    "dreambooth_lora": dreambooth_lora,
}
"""Name to method of everything that is compared."""
