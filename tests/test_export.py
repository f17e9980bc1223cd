"""Export: every key is one that other tools map, and what they load is what the library holds in memory."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_parametrisations import BASES, FORMS, random_adapter, shared_base

from spectral_diffusion.adapter import Adapter
from spectral_diffusion.adapter_file import load_adapter, save_adapter
from spectral_diffusion.base import Base, linear_layers, load_base
from spectral_diffusion.errors import AdapterError
from spectral_diffusion.exactness import export_error, fusion_error
from spectral_diffusion.export import Export, export_kohya
from spectral_diffusion.export.kohya import embedding_file_name, kohya_name
from spectral_diffusion.fusion import fuse

HALF_PRECISION = 1e-3
"""Largest relative difference of a delta written in float16 (issue 2, exactness)."""

READABLE_KEY = re.compile(
    r"(lora_unet_(down_blocks|up_blocks|mid_block)_(\d_)?attentions_\d_transformer_blocks_\d_attn[12]_to_(q|k|v|out_0)"
    r"|lora_te_text_model_encoder_layers_\d+_self_attn_(q|k|v|out)_proj)\.(lora_down\.weight|lora_up\.weight|alpha)"
)
"""The keys that every reader maps (formats.md)."""


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> Base:
    return shared_base("tiny", tiny_base_folder)


@pytest.fixture(scope="module")
def pair(base: Base) -> Adapter:
    """Two concepts of different rank, form and number of vectors, aligned."""
    dog = random_adapter(base, measured=True, vectors=2)
    cat = random_adapter(base, "rotational", token="<Kätzchen>", start=2, rank=3, measured=True, seed=1)
    return fuse([dog, cat], strengths=[1.0, 0.7])


@pytest.fixture
def export(pair: Adapter, tmp_path: Path) -> Export:
    return export_kohya(pair, tmp_path / "my pair.safetensors")


def test_names_are_those_that_every_reader_maps(export: Export, pair: Adapter) -> None:
    unet = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert kohya_name(unet) == "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    text = "text_encoder.encoder.layers.0.self_attn.q_proj"
    assert kohya_name(text) == "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    names = load_file(export.lora).keys()
    assert not [name for name in names if not READABLE_KEY.fullmatch(name)]
    assert len(names) == 3 * len(pair.layer_keys())


def test_the_file_holds_one_alpha_and_matrices_of_one_rank(export: Export) -> None:
    tensors = load_file(export.lora)
    assert export.rank == 2 * 2 + 3
    assert {tensor.item() for name, tensor in tensors.items() if name.endswith(".alpha")} == {export.rank}
    downs = [tensor.shape for name, tensor in tensors.items() if name.endswith("lora_down.weight")]
    ups = [tensor.shape for name, tensor in tensors.items() if name.endswith("lora_up.weight")]
    assert {len(shape) for shape in downs + ups} == {2}
    assert {shape[0] for shape in downs} == {shape[1] for shape in ups} == {export.rank}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_layers_of_different_rank_are_padded_to_one(base: Base, tmp_path: Path) -> None:
    one, two = random_adapter(base), random_adapter(base, token="<V2>", start=2)
    (concept,) = two.concepts
    few = {key: part for key, part in concept.layers.items() if ".attn2." in key}
    fused = fuse([one, replace(two, concepts=(replace(concept, layers=few),))], method="sum")
    assert {delta.rank for delta in fused.deltas().values()} == {4, 8}
    export = export_kohya(fused, tmp_path / "a.safetensors")
    tensors = load_file(export.lora)
    assert {tensor.shape[1] for name, tensor in tensors.items() if name.endswith("lora_up.weight")} == {8}
    assert export_error(base, fused, export.lora) < HALF_PRECISION


def test_the_metadata_is_complete(export: Export) -> None:
    with safe_open(export.lora, "pt") as file:
        metadata = file.metadata()
    content = export.lora.read_bytes()
    payload = content[8 + int.from_bytes(content[:8], "little") :]
    expected = {
        "ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_network_module": "networks.lora", "ss_network_dim": "7",
        "ss_network_alpha": "7.0", "ss_output_name": "my pair", "sshs_model_hash": hashlib.sha256(payload).hexdigest(),
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "my pair", "modelspec.trigger_phrase": "V1, Kätzchen",
    }  # fmt: skip
    assert {key: metadata.get(key) for key in expected} == expected
    assert metadata.keys() - expected.keys() == {"ss_tag_frequency", "modelspec.date", "modelspec.description"}
    assert set(json.loads(metadata["ss_tag_frequency"])["spectral-diffusion"]) == {"V1", "Kätzchen"}
    assert export.trigger_words == {"<V1>": "V1", "<Kätzchen>": "Kätzchen"}


def test_the_side_file_holds_the_words_to_type(export: Export) -> None:
    assert export.description == export.lora.with_suffix(".json")
    record = json.loads(export.description.read_text(encoding="utf-8"))
    assert record == {"activation text": "V1 and Kätzchen", "preferred weight": 1.0, "sd version": "SD1"}


def test_sd2_is_called_sd2(pair: Adapter, tmp_path: Path) -> None:
    export = export_kohya(replace(pair, family="sd2"), tmp_path / "a.safetensors")
    with safe_open(export.lora, "pt") as file:
        metadata = file.metadata()
    names = "ss_base_model_version", "ss_v2", "modelspec.architecture"
    assert [metadata[name] for name in names] == ["sd_v2", "True", "stable-diffusion-v2-512/lora"]
    assert json.loads(export.description.read_text(encoding="utf-8"))["sd version"] == "SD2"


@torch.no_grad()
def acting_weights(base: Base, keys: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return each layer's weight `(out, in)` as it acts, whatever is wrapped around the layer."""
    acting = {}
    for key in keys:
        part, _, path = key.partition(".")
        module = (base.pipeline.unet if part == "unet" else base.pipeline.text_encoder).get_submodule(path)
        acting[key] = (module(torch.eye(module.in_features)) - module(torch.zeros(1, module.in_features))).T
    return acting


@pytest.mark.parametrize("which", BASES)
def test_diffusers_loads_the_delta_of_every_layer(which: str, tiny_base_folder: Path, tmp_path: Path) -> None:
    base = load_base(tiny_base_folder if which == "tiny" else None, device="cpu")
    fused = fuse(
        [
            random_adapter(base, form, token=f"<V{number}>", start=2 * number, measured=True, seed=number)
            for number, form in enumerate(FORMS)
        ]
    )
    keys = fused.layer_keys()
    assert set(keys) == set(linear_layers(base))
    before = acting_weights(base, keys)
    export = export_kohya(fused, tmp_path / "lora.safetensors")
    base.pipeline.load_lora_weights(tmp_path, weight_name=export.lora.name)
    after = acting_weights(base, keys)
    errors = {
        key: ((after[key] - before[key] - delta.dense()).norm() / delta.dense().norm()).item()
        for key, delta in fused.deltas().items()
    }
    assert max(errors.values()) < HALF_PRECISION, max(errors, key=errors.get)


def test_the_export_check_sees_a_wrong_file(base: Base, pair: Adapter, tmp_path: Path) -> None:
    export = export_kohya(pair.scaled(1.01), tmp_path / "pair.safetensors")
    assert export_error(base, pair, export.lora) == pytest.approx(0.01, rel=0.2)
    assert export_error(base, pair.scaled(1.01), export.lora) < HALF_PRECISION


def test_the_fusion_check_is_exact(base: Base) -> None:
    adapters = [random_adapter(base, token=f"<V{n}>", start=2 * n, seed=n, measured=True) for n in (1, 2)]
    assert fusion_error(base, fuse(adapters)) < 1e-5


def test_diffusers_loads_the_tokens(tiny_base: Base, pair: Adapter, export: Export) -> None:
    pipeline = tiny_base.pipeline
    for concept in pair.concepts:
        pipeline.load_textual_inversion(export.embeddings[concept.token], token=concept.token)
        words = [concept.token, *(f"{concept.token}_{number}" for number in range(1, concept.token_vectors))]
        rows = pipeline.text_encoder.get_input_embeddings().weight[pipeline.tokenizer.convert_tokens_to_ids(words)]
        torch.testing.assert_close(rows, concept.embeddings["text_encoder"], rtol=HALF_PRECISION, atol=1e-4)


@pytest.mark.parametrize(
    ("token", "name"),
    [
        ("<V1>", "V1"),
        ("<my-cat_2>", "my-cat_2"),
        ("<my/cat>", "my_cat"),
        ("<Mückchen>", "Mückchen"),
        ("<猫>", "猫"),
        ("../../etc/passwd", "etc_passwd"),
        ("C:\\cat?*", "C__cat"),
        ("<.>", "token-" + hashlib.sha256(b"<.>").hexdigest()[:8]),
    ],
)
def test_a_token_becomes_a_file_name_that_every_file_system_takes(token: str, name: str) -> None:
    assert embedding_file_name(token) == name


def test_tokens_and_the_lora_never_share_a_file(base: Base, tmp_path: Path) -> None:
    adapters = [random_adapter(base, token=token, start=2 * n) for n, token in enumerate(("<V1>", "V1", "<pair>"))]
    export = export_kohya(fuse(adapters, method="sum"), tmp_path / "Pair.safetensors")
    assert export.trigger_words == {"<V1>": "V1", "V1": "V1-2", "<pair>": "pair-3"}
    assert all(load_file(file).keys() == {"emb_params"} for file in export.embeddings.values())
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_numbers_too_large_for_half_precision_are_refused(pair: Adapter, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"too large for torch\.float16; lower the strengths"):
        export_kohya(pair.scaled(1e12), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_embedding_never_overwrites_an_adapter_of_its_name(pair: Adapter, tmp_path: Path) -> None:
    save_adapter(pair, tmp_path / "V1.safetensors")
    with pytest.raises(AdapterError, match="would overwrite the adapter"):
        export_kohya(pair, tmp_path / "pair.safetensors")
    assert load_adapter(tmp_path / "V1.safetensors").tokens == pair.tokens
    assert not (tmp_path / "pair.safetensors").exists()
