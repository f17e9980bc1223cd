"""What diffusers and PEFT load from an exported file is the adapter in memory: every layer, every token, and the picture."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_loras import (
    ENDINGS,
    LORAS,
    PRECISIONS,
    acting,
    largest_error,
    load_tokens,
    made_of_probes,
    narrow_base,
    picture,
    picture_of_reader,
    random_lora,
    relative,
)
from narrow_bases import FAMILIES, NarrowBase
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from random_adapters import random_adapter
from safetensors.torch import load_file

from spectral_diffusion.adapters.adapter import Adapter, token_words
from spectral_diffusion.adapters.attach import attached
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base, adaptable_layers, layer_key, load_base
from spectral_diffusion.bases.layer_names import kohya_name
from spectral_diffusion.export import export_embeddings, export_kohya


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, narrow_bases: dict[str, NarrowBase]) -> Base:
    """A random base with the whole structure of its family, and narrow."""
    return narrow_base(request.param, narrow_bases[request.param].folder)


@pytest.fixture(scope="module")
def adapter(base: Base) -> Adapter:
    """Two spectral concepts on the attention layers and a LoRA of differing ranks on every layer that LoRAs change."""
    dog = random_adapter(base, vectors=2, size=0.05)
    cat = random_adapter(base, "rotational", token="<V2>", start=2, rank=3, size=0.05, seed=1)
    return fuse([dog, cat, random_lora(base)], strengths=[1.0, 0.7, 0.5], method="sum")


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
