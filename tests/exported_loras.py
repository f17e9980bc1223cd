"""What the tests of files for other tools share: LoRAs of every layer, what layers make of probes, and reading them back."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from spectral_diffusion.adapters.adapter import Adapter, ConceptPart, LayerPart
from spectral_diffusion.bases.base import Base, adaptable_layers, layer_key, load_base
from spectral_diffusion.bases.layer_matrix import matrix_of
from spectral_diffusion.bases.layer_names import (
    ATTENTION_LAYERS,
    CONVOLUTION_LAYERS,
    FEED_FORWARD_LAYERS,
)
from spectral_diffusion.export import Export, export_diffusers, export_kohya
from spectral_diffusion.imports import import_lora
from spectral_diffusion.joining import LowRank
from spectral_diffusion.prompts.conditioning import prompts
from spectral_diffusion.prompts.tokens import expand_prompt

ENDINGS = (*ATTENTION_LAYERS, *FEED_FORWARD_LAYERS, *CONVOLUTION_LAYERS, "time_emb_proj")
"""All layers that LoRAs change, those of convolutions among them."""
PROJECTIONS = (*ATTENTION_LAYERS, *FEED_FORWARD_LAYERS, "proj_in", "proj_out")
"""Those that LoRAs without convolutions change."""
PROBES = 64
PRECISIONS = {torch.float16: 1e-3, torch.float32: 1e-5}
"""Largest relative difference per precision of the file (issue 3, proof)."""
LORAS = {"kohya": export_kohya, "diffusers": export_diffusers}
TOKENS = ("<V1>", "<V2>", "<V3>")
PROMPT = "<V1> and <V2> near <V3>"


@cache
def narrow_base(family: str, folder: Path) -> Base:
    return load_base(folder, device="cpu")


def random_lora(base: Base, token: str = "<V3>", seed: int = 2, endings: tuple[str, ...] = ENDINGS) -> Adapter:
    """Return a LoRA without an embedding, of the layers that end in one of `endings`, whose ranks differ."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for number, (key, layer) in enumerate(adaptable_layers(base, None).items()):
        if any(key.endswith(f".{ending}") for ending in endings):
            out_side, in_side = matrix_of(layer).shape
            up, down = (0.05 * torch.randn(size, 1 + number % 3, generator=generator) for size in (out_side, in_side))
            if isinstance(layer, nn.Conv2d):  # as strong as the others together, they would make a picture of rounding errors
                down = down / (4 * layer.kernel_size[0])
            layers[key] = LayerPart(band=None, tensors={"up": up, "down": down})
    concept = ConceptPart(
        token=token, class_word="snow", band=None, parametrisation="lora", embeddings={}, layers=layers, settings={}
    )
    return Adapter(family=base.family, fingerprint="", concepts=(concept,), weights=(1.0,))


@torch.no_grad()
def acting(base: Base, keys: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return what each layer makes of its `probes (n, in)`, `(n, out)` in float64, whatever is wrapped around it."""
    modules = {
        layer_key(part, path): module
        for part in ("unet", *base.text_encoders)
        for path, module in getattr(base.pipeline, part).named_modules()
    }
    made = {}
    for key in keys:
        module = copy.deepcopy(modules[key]).double()
        layer = next(inner for inner in module.modules() if isinstance(inner, nn.Linear | nn.Conv2d))
        read, pixel = probes(matrix_of(layer).shape[1]), ()
        if isinstance(layer, nn.Conv2d):  # patches with a rim of zeros around them, and the pixel that reads all of each
            rim = layer.kernel_size[0] // 2
            read = nn.functional.pad(read.unflatten(1, (-1, *layer.kernel_size)), (rim,) * 4)
            pixel = (2 * rim // layer.stride[0],) * 2
        made[key] = (module(read) - module(torch.zeros_like(read)))[:, :, *pixel]
    return made


def probes(width: int) -> torch.Tensor:
    """Return random `(n, width)` that no change of a weight `(out, width)` goes unseen by."""
    return torch.randn(PROBES, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width)) / (PROBES) ** 0.5


def made_of_probes(delta: LowRank) -> torch.Tensor:
    """Return what a change makes of the probes of its layer; its norm is near the change's own."""
    return probes(len(delta.down)) @ delta.down.double() @ delta.up.double().T


def relative(value: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


def largest_error(reader: Base, adapter: Adapter, wanted: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of what any layer makes of its probes from `wanted`, relative to the layer's change."""
    made = acting(reader, tuple(wanted))
    return max(float((made[key] - wanted[key]).norm() / made_of_probes(adapter.delta(key)).norm()) for key in wanted)


def load_tokens(base: Base, export: Export) -> None:
    """Load the embeddings as their users do: SDXL's files one tensor at a time."""
    for token, file in export.embeddings.items():
        if base.family != "sdxl":
            base.pipeline.load_textual_inversion(file, token=token.lower())
            continue
        for name, part in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
            base.pipeline.load_textual_inversion(
                load_file(file)[name],
                token=token.lower(),
                text_encoder=base.text_encoders[part],
                tokenizer=base.tokenizers[part],
            )


def picture(base: Base, adapter: Adapter | None) -> np.ndarray:
    """Draw all concepts of the attached `adapter`; class words only for None."""
    words = {concept.token: concept.words for concept in adapter.concepts} if adapter else dict.fromkeys(TOKENS, "snow")
    return drawn_with(base, **prompts(base, [expand_prompt(PROMPT, words)], [""]))


def picture_of_reader(base: Base) -> np.ndarray:
    """Draw all concepts from loaded files, typing what `places` says, in lower case: of other tokens one vector is found."""
    return drawn_with(base, prompt="<v1> and <v2> near snow", negative_prompt="")


def drawn_with(base: Base, **conditioning: object) -> np.ndarray:
    return base.pipeline(
        **conditioning,
        num_inference_steps=2,
        guidance_scale=2.0,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images[0]


def imported(path: Path, **options: object) -> Adapter:
    return import_lora(path, **({"token": "<V1>", "class_word": "snow"} | options))


def assert_same_deltas(one: Adapter, other: Adapter, tolerance: float = 1e-6) -> None:
    deltas = one.deltas()
    assert deltas.keys() == other.deltas().keys()
    for key, delta in other.deltas().items():
        assert (deltas[key].dense() - delta.dense()).norm() / delta.dense().norm() < tolerance, key
