"""What diffusers and PEFT load from an exported file is the adapter in memory: every layer, every token, and the picture."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from narrow_bases import FAMILIES, NarrowBase
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from test_layer_names import ENDINGS
from test_parametrisations import random_adapter
from torch import nn

from spectral_diffusion.adapter import Adapter, ConceptPart, LayerPart, token_words
from spectral_diffusion.attach import attached
from spectral_diffusion.base import Base, adaptable_layers, layer_key, load_base
from spectral_diffusion.conditioning import prompts
from spectral_diffusion.export import Export, export_diffusers, export_embeddings, export_kohya
from spectral_diffusion.fusion import fuse
from spectral_diffusion.joining import LowRank
from spectral_diffusion.layer_matrix import matrix_of
from spectral_diffusion.layer_names import kohya_name
from spectral_diffusion.prompt_tokens import expand_prompt

PROBES = 64
PRECISIONS = {torch.float16: 1e-3, torch.float32: 1e-5}
"""Largest relative difference per precision of the file (issue 3, proof)."""

LORAS = {"kohya": export_kohya, "diffusers": export_diffusers}
TOKENS = ("<V1>", "<V2>", "<V3>")
PROMPT = "<V1> and <V2> near <V3>"


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, narrow_bases: dict[str, NarrowBase]) -> Base:
    """A random base with the whole structure of its family, and narrow."""
    return narrow_base(request.param, narrow_bases[request.param].folder)


@cache
def narrow_base(family: str, folder: Path) -> Base:
    return load_base(folder, device="cpu")


@pytest.fixture(scope="module")
def adapter(base: Base) -> Adapter:
    """Two spectral concepts on the attention layers and a LoRA of differing ranks on every layer that LoRAs change."""
    dog = random_adapter(base, vectors=2, size=0.05)
    cat = random_adapter(base, "rotational", token="<V2>", start=2, rank=3, size=0.05, seed=1)
    return fuse([dog, cat, random_lora(base)], strengths=[1.0, 0.7, 0.5], method="sum")


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


@pytest.fixture(scope="module")
def reader(base: Base, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The same base in a pipeline of its own, to load files into, with the tokens loaded."""
    fresh = load_base(base.source, device="cpu")
    load_tokens(fresh, export_embeddings(adapter, tmp_path_factory.mktemp("tokens"), dtype=torch.float32))
    return fresh


@pytest.fixture(scope="module")
def wanted(base: Base, adapter: Adapter) -> dict[str, torch.Tensor]:
    """What every layer makes of its probes with the adapter, in double precision."""
    deltas = adapter.deltas()
    old = acting(base, tuple(deltas))
    return {key: old[key] + made_of_probes(delta) for key, delta in deltas.items()}


@pytest.fixture(scope="module")
def drawn(base: Base, adapter: Adapter) -> np.ndarray:
    """A picture of all concepts, drawn with the adapter in memory."""
    with attached(base, adapter):
        drawn = picture(base, adapter)
    return drawn


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


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("form", LORAS)
def test_diffusers_loads_every_layer_and_draws_the_same(
    form: str,
    dtype: torch.dtype,
    base: Base,
    reader: Base,
    adapter: Adapter,
    wanted: dict[str, torch.Tensor],
    drawn: np.ndarray,
    tmp_path: Path,
) -> None:
    export = LORAS[form](adapter, tmp_path / "all.safetensors", dtype=dtype)
    assert set(wanted) > set(adaptable_layers(base))
    reader.pipeline.load_lora_weights(tmp_path, weight_name=export.path.name)
    try:
        assert largest_error(reader, adapter, wanted) < PRECISIONS[dtype]
        assert relative(picture_of_reader(reader), drawn) < PRECISIONS[dtype]
    finally:
        reader.pipeline.unload_lora_weights()
    assert largest_error(reader, adapter, wanted) > 0.9 and relative(picture(base, None), drawn) > 0.01


def test_peft_alone_loads_a_kohya_file(base: Base, adapter: Adapter, wanted: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The file's three tensors per module are PEFT's `lora_A`, `lora_B` and `lora_alpha`, without diffusers' own reading."""
    tensors = load_file(export_kohya(adapter, tmp_path / "all.safetensors", dtype=torch.float32).path)
    (alpha,) = {tensor.item() for name, tensor in tensors.items() if name.endswith(".alpha")}
    pipeline = copy.copy(base.pipeline)
    for part in ("unet", *base.text_encoders):
        model = copy.deepcopy(getattr(base.pipeline, part))
        setattr(pipeline, part, model)
        names = {path: kohya_name(layer_key(part, path), base.family) for path, _ in model.named_modules() if known(path)}
        config = LoraConfig(r=int(alpha), lora_alpha=alpha, target_modules=list(names))
        inject_adapter_in_model(config, model)
        state = {f"{path}.lora_A.weight": tensors.pop(f"{name}.lora_down.weight") for path, name in names.items()}
        state |= {f"{path}.lora_B.weight": tensors.pop(f"{name}.lora_up.weight") for path, name in names.items()}
        assert not set_peft_model_state_dict(model, state).unexpected_keys
    assert all(name.endswith(".alpha") for name in tensors)
    assert largest_error(replace(base, pipeline=pipeline), adapter, wanted) < PRECISIONS[torch.float32]


def known(path: str) -> bool:
    return any(path.endswith(f".{ending}") for ending in ENDINGS)


def test_the_tokens_are_loaded(base: Base, reader: Base, adapter: Adapter, tmp_path: Path) -> None:
    export = export_embeddings(adapter, tmp_path)
    assert list(export.embeddings) == ["<V1>", "<V2>"] and export.words["<V3>"] == "snow"
    for concept in adapter.concepts[:2]:
        tensors = load_file(export.embeddings[concept.token])
        assert tensors.keys() == ({"clip_l", "clip_g"} if base.family == "sdxl" else {"emb_params"})
        for name, half in tensors.items():
            part = "text_encoder_2" if name == "clip_g" else "text_encoder"
            vectors = concept.embeddings[part]
            assert half.dtype == torch.float16 and (half - vectors).norm() / vectors.norm() < PRECISIONS[torch.float16]
            words = token_words(concept.token.lower(), len(vectors)).split()
            ids = reader.tokenizers[part].convert_tokens_to_ids(words)
            assert torch.equal(reader.text_encoders[part].get_input_embeddings().weight[ids], vectors)
