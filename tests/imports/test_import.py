"""Import: LoRAs of every naming come in as what they are, go round through files, and what is no plain LoRA is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exported_loras import assert_same_deltas, imported, random_lora
from random_adapters import random_adapter
from safetensors.torch import load_file, save_file

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.adapter_file import load_adapter, save_adapter
from spectral_diffusion.adapters.attach import attached
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base
from spectral_diffusion.errors import AdapterError, InputError
from spectral_diffusion.export import export_diffusers, export_kohya, places
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.generate import generate

Tensors = dict[str, torch.Tensor]
Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
K = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
Q_KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PEFT_Q = f"{Q_KEY}.lora"
OWN_PEFT_Q = f"base_model.model.{Q_KEY.removeprefix('unet.')}.lora"
OLD_Q = Q_KEY.replace("to_q", "processor.to_q")


@pytest.fixture
def lora(base: Base) -> Adapter:
    return random_lora(base, "<V1>")


def pair_of(rank: int, out: int = 64, width: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator)


@pytest.mark.parametrize("export", [export_kohya, export_diffusers])
def test_what_was_exported_comes_back(export: Callable[..., object], lora: Adapter, base: Base, tmp_path: Path) -> None:
    export(lora, tmp_path / "a.safetensors", dtype=torch.float32)
    again = imported(tmp_path / "a.safetensors", base=base)
    assert_same_deltas(again, lora)
    assert (again.tokens, again.class_words, again.family, again.fingerprint) == (("<V1>",), {"<V1>": "snow"}, base.family, "")
    assert again.concepts[0].band is None and again.concepts[0].words == "snow"
    assert any(key.endswith("proj_in") for key in again.layer_keys())


def test_alphas_and_ranks_that_differ_are_read_right(tmp_path: Path) -> None:
    (up, down), (wide, narrow) = pair_of(4), pair_of(2, width=768)
    tensors = {f"{Q}.lora_up.weight": up, f"{Q}.lora_down.weight": down, f"{Q}.alpha": torch.tensor(1.0)}
    tensors |= {f"{K}.lora_up.weight": wide, f"{K}.lora_down.weight": narrow, f"{K}.alpha": torch.tensor(8.0)}
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    adapter = imported(tmp_path / "a.safetensors")
    assert adapter.family == "sd1"
    deltas = adapter.deltas()
    torch.testing.assert_close(deltas[Q_KEY].dense(), up.half().float() @ down.half().float() / 4, rtol=1e-5, atol=1e-5)
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    torch.testing.assert_close(deltas[key].dense(), 4 * wide.half().float() @ narrow.half().float(), rtol=1e-5, atol=1e-4)
    assert (deltas[Q_KEY].rank, deltas[key].rank) == (4, 2)
    exported = export_kohya(adapter, tmp_path / "b.safetensors", dtype=torch.float32)
    assert exported.rank == 4
    assert_same_deltas(imported(exported.path), adapter)


@pytest.mark.parametrize(
    ("up_name", "down_name"),
    [
        (f"{PEFT_Q}_B.weight", f"{PEFT_Q}_A.weight"),
        (f"{PEFT_Q}_B.default.weight", f"{PEFT_Q}_A.default.weight"),
        (f"{PEFT_Q}.up.weight", f"{PEFT_Q}.down.weight"),
        (f"{OLD_Q}_lora.up.weight", f"{OLD_Q}_lora.down.weight"),
        (f"base_model.model.{PEFT_Q[5:]}_B.weight", f"base_model.model.{PEFT_Q[5:]}_A.weight"),
        (f"{PEFT_Q[5:]}_B.weight", f"{PEFT_Q[5:]}_A.weight"),
    ],
)
def test_every_naming_is_read(up_name: str, down_name: str, base: Base, tmp_path: Path) -> None:
    up, down = pair_of(3)
    save_file({up_name: up, down_name: down}, tmp_path / "a.safetensors")
    torch.testing.assert_close(
        imported(tmp_path / "a.safetensors", base=base).delta(Q_KEY).dense(), up @ down, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("configuration", "scale"),
    [
        ({"lora_alpha": 8, "r": 4}, 2.0),
        ({"lora_alpha": 8, "r": 4, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_k": 2}}, 2.0),
        ({"lora_alpha": 8, "alpha_pattern": {r"mid_block\..*attn[12]\.to_(q|k)": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {r"^attn1\.to_q": 2, r"^mid_block.*\.to_q": 4}}, 1.0),
    ],
)
@pytest.mark.parametrize("place", ["metadata", "file"])
def test_peft_says_its_alpha_apart(
    configuration: dict[str, object], scale: float, place: str, base: Base, tmp_path: Path
) -> None:
    up, down = pair_of(4)
    path, metadata = tmp_path / "adapter_model.safetensors", {}
    if place == "file":
        (tmp_path / "adapter_config.json").write_text(json.dumps(configuration))
    else:
        metadata["lora_adapter_metadata"] = json.dumps({f"unet.{name}": value for name, value in configuration.items()})
    name = OWN_PEFT_Q if place == "file" else PEFT_Q
    save_file({f"{name}_B.weight": up, f"{name}_A.weight": down}, path, metadata)
    torch.testing.assert_close(imported(path, base=base).delta(Q_KEY).dense(), scale * up @ down, rtol=1e-5, atol=1e-4)


def test_a_peft_file_is_scaled_right_under_any_name(base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    up, down = pair_of(4)
    path = tmp_path / "friend.safetensors"
    save_file({f"{OWN_PEFT_Q}_B.weight": up, f"{OWN_PEFT_Q}_A.weight": down}, path)
    torch.testing.assert_close(imported(path, base=base).delta(Q_KEY).dense(), up @ down, rtol=1e-5, atol=1e-4)
    assert "does not say by what its change is scaled, 1 is taken" in caplog.text
    caplog.clear()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "r": 4}))
    torch.testing.assert_close(imported(path, base=base).delta(Q_KEY).dense(), 4 * up @ down, rtol=1e-5, atol=1e-4)
    assert not caplog.text


@pytest.mark.parametrize(
    ("width", "prefix", "family"),
    [
        (768, "lora_te", "sd1"),
        (1024, "lora_te", "sd2"),
        (768, "lora_te1", "sdxl"),
        (1280, "lora_te2", "sdxl"),
        (40, "lora_te", "mini"),
    ],
)
def test_the_family_is_told_from_the_shapes(width: int, prefix: str, family: str, tmp_path: Path) -> None:
    up, down = pair_of(2, out=width, width=width)
    name = f"{prefix}_text_model_encoder_layers_0_self_attn_q_proj"
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, tmp_path / "a.safetensors")
    assert imported(tmp_path / "a.safetensors").family == family


@pytest.mark.parametrize(
    ("module", "width", "metadata", "family"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 640, {}, "sdxl"),
        ("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", 1280, {"ss_base_model_version": "sd_v1"}, "sdxl"),
        ("lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q", 1280, {}, "sdxl"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 768, {}, "sd1"),
        (f"unet.{Q_KEY[5:].replace('blocks.0', 'blocks.3')}", 1280, {}, "sdxl"),
        ("lora_unet_label_emb_0_0", 2816, {}, "sdxl"),
        ("unet.add_embedding.linear_1", 2816, {}, "sdxl"),
        (Q, 1280, {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        (Q, 1280, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        (Q, 1280, {"ss_base_model_version": "sd_v2_v"}, "sd2"),
        (Q, 1280, {"ss_base_model_version": "sd_2.1"}, "sd2"),
        (Q, 1280, {"ss_base_model_version": "sd_1.5"}, "sd1"),
        (Q, 1280, {"modelspec.architecture": "stable-diffusion-v1/lora"}, "sd1"),
    ],
)
def test_without_layers_that_read_text_the_family_is_told_from_names_or_metadata(
    module: str, width: int, metadata: dict[str, str], family: str, tmp_path: Path
) -> None:
    up, down = pair_of(2, out=64, width=width)
    save_file({f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}, tmp_path / "a.safetensors", metadata)
    assert imported(tmp_path / "a.safetensors").family == family


def test_a_family_that_nothing_tells_is_asked_for(base: Base, tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "slider.safetensors", {"ss_base_model_version": "unknown"})
    with pytest.raises(InputError, match=r"Nothing in '.*slider\.safetensors' tells which .* give that one as --base"):
        imported(tmp_path / "slider.safetensors")
    assert imported(tmp_path / "slider.safetensors", base=base).family == base.family


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bfloat16, torch.float64])
def test_alphas_are_read_in_every_type(dtype: torch.dtype, base: Base, tmp_path: Path) -> None:
    save_file(GOOD | {f"{Q}.alpha": torch.tensor(4, dtype=dtype)}, tmp_path / "a.safetensors")
    delta = imported(tmp_path / "a.safetensors", base=base).delta(Q_KEY)
    torch.testing.assert_close(delta.dense(), torch.full((64, 64), 4.0))


def test_an_embedding_belongs_to_it(base: Base, lora: Adapter, tmp_path: Path) -> None:
    spectral = random_adapter(base, vectors=2)
    export = export_kohya(spectral, tmp_path / "a.safetensors", dtype=torch.float32)
    again = imported(export.path, embedding=export.embeddings["<V1>"], base=base)
    assert torch.equal(again.concepts[0].embeddings["text_encoder"], spectral.concepts[0].embeddings["text_encoder"])
    assert again.concepts[0].words == "<V1> <V1>_1"
    drawing = Drawing(prompt="<V1> near a lake", steps=2, size=(32, 32))
    one, other = (generate(base, drawing, adapter)[0].image for adapter in (spectral, again))
    assert max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)) <= 1


def test_without_an_embedding_the_token_stands_for_the_class_word(base: Base, lora: Adapter) -> None:
    drawing = Drawing(prompt="<V1> near a lake", steps=2, size=(32, 32))
    (named,) = generate(base, drawing, lora)
    with attached(base, lora):
        (said,) = generate(base, Drawing(prompt="snow near a lake", steps=2, size=(32, 32)))
    (bare,) = generate(base, Drawing(prompt="snow near a lake", steps=2, size=(32, 32)))
    assert named.image.tobytes() == said.image.tobytes() != bare.image.tobytes()
    assert named.tokens == ("<V1>",)


def test_an_imported_lora_goes_round_through_files_fusing_and_export(base: Base, lora: Adapter, tmp_path: Path) -> None:
    export_kohya(lora, tmp_path / "lora.safetensors")
    adapter = imported(tmp_path / "lora.safetensors", base=base)
    save_adapter(adapter, tmp_path / "adapter.safetensors")
    loaded = load_adapter(tmp_path / "adapter.safetensors")
    assert loaded.concepts[0].band is None and loaded.concepts[0].embeddings == {} and loaded.fingerprint == ""
    assert_same_deltas(loaded, adapter, 1e-3)
    spectral = random_adapter(base, token="<V2>", measured=True)
    with pytest.raises(AdapterError, match=r"'<V1>' carries no measured activations.*method 'sum'"):
        fuse([spectral, loaded])
    for adapters in ([spectral, loaded], [loaded, spectral]):
        fused = fuse(adapters, method="sum")
        assert fused.fingerprint == base.fingerprint
        for key in loaded.layer_keys():
            expected = sum(part.delta(key).dense() for part in adapters if key in part.layer_keys())
            torch.testing.assert_close(fused.delta(key).dense(), expected, rtol=1e-4, atol=1e-5)
    export = export_kohya(fused, tmp_path / "both.safetensors")
    assert export.words == {"<V1>": "snow", "<V2>": "V2"} and list(export.embeddings) == ["<V2>"]
    assert [line.partition("type: ")[2] for line in places(export)] == [
        "<lora:both:1> snow and V2",
        "snow and embedding:V2 (with the LoRA loaded)",
    ]
    again = imported(export.path, base=base)
    assert_same_deltas(again, fused, 1e-3)


def test_embeddings_inside_are_left_out_with_a_warning(base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    up, down = pair_of(2)
    tensors = {f"{Q}.lora_up.weight": up, f"{Q}.lora_down.weight": down}
    save_file(tensors | {"bundle_emb.cat.string_to_param.*": torch.ones(1, 768)}, tmp_path / "a.safetensors")
    imported(tmp_path / "a.safetensors", base=base)
    assert "holds embeddings (cat), which are not read" in caplog.text


GOOD = {f"{Q}.lora_up.weight": torch.ones(64, 2), f"{Q}.lora_down.weight": torch.ones(2, 64), f"{Q}.alpha": torch.tensor(2.0)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, "is a whole checkpoint.*as --base"),
        ({"first_stage_model.decoder.conv_in.weight": torch.ones(1)}, "is a whole checkpoint"),
        ({"decoder.conv_in.weight": torch.ones(1)}, "is a VAE"),
        ({"down_blocks.0.resnets.0.conv1.weight": torch.ones(1)}, "is a whole UNet"),
        ({"emb_params": torch.ones(1, 768)}, "is an embedding, not a LoRA; give it as --embedding"),
        ({f"{Q}.hada_w1_a": torch.ones(2, 2)}, "is a LoHa"),
        ({f"{Q}.lokr_w1": torch.ones(2, 2)}, "is a LoKr"),
        (GOOD | {f"{Q}.dora_scale": torch.ones(64, 1)}, "is a DoRA"),
        (GOOD | {f"{PEFT_Q}_magnitude_vector": torch.ones(64)}, "is a DoRA"),
        (GOOD | {f"{Q}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "is a LoCon in Tucker form"),
        (
            GOOD
            | {
                "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": torch.ones(8, 2, 1, 1),
                "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": torch.ones(2, 8, 5, 5),
            },
            r"conv1' .* has matrices of shape \(8, 2\) and \(2, 8, 5, 5\)",
        ),
        (
            {"lora_transformer_x.lora_up.weight": torch.ones(8, 2), "lora_transformer_x.lora_down.weight": torch.ones(2, 8)},
            "changes 'lora_transformer_x', which is no layer of Stable Diffusion 1, 2 or XL that .* for one of these",
        ),
        (GOOD | {"surprise": torch.ones(1)}, "it holds 'surprise'"),
        ({f"{Q}.lora_up.weight": torch.ones(64, 2)}, "lacks its up or its down matrix"),
        (GOOD | {f"{Q}.lora_up.weight": torch.ones(64, 3)}, r"matrices of shape \(64, 3\) and \(2, 64\)"),
        (GOOD | {f"{Q}.lora_up.weight": torch.ones(64)}, r"matrices of shape \(64,\)"),
        (GOOD | {f"{Q}.lora_up.weight": torch.full((64, 2), torch.nan)}, "holds NaN"),
        (GOOD | {f"{Q}.alpha": torch.tensor(torch.inf)}, "holds NaN, infinite"),
        (GOOD | {f"{Q}.alpha": torch.ones(2)}, "alpha of .* is not one number"),
        (GOOD | {f"{Q}.lora_up.weight": torch.ones(64, 2, dtype=torch.int32)}, "no floating-point numbers"),
        (
            GOOD | {f"{PEFT_Q}_A.weight": torch.ones(2, 64), f"{PEFT_Q}_B.weight": torch.ones(64, 2)},
            "changes layer .* twice",
        ),
        ({}, "holds no LoRA"),
    ],
)
def test_what_is_no_plain_lora_is_refused_with_its_name(tensors: Tensors, message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "schöne.safetensors")
    with pytest.raises(InputError, match=message) as error:
        imported(tmp_path / "schöne.safetensors")
    assert "schöne.safetensors'" in str(error.value)


def test_an_adapter_of_ours_is_no_foreign_lora(base: Base, tmp_path: Path) -> None:
    save_adapter(random_adapter(base), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="is an adapter of this program already"):
        imported(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_files_are_refused(kept: int, lora: Adapter, tmp_path: Path) -> None:
    path = export_kohya(lora, tmp_path / "a.safetensors").path
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="is damaged or not a safetensors file"):
        imported(path)
    with pytest.raises(InputError, match="There is no file"):
        imported(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    "metadata",
    [
        "{",
        "7",
        '{"unet.lora_alpha": "much"}',
        '{"unet.lora_alpha": 1, "unet.alpha_pattern": 7}',
        '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 7}}',
    ],
)
def test_a_damaged_configuration_is_said(metadata: str, tmp_path: Path) -> None:
    up, down = pair_of(2)
    tensors = {f"{PEFT_Q}_B.weight": up, f"{PEFT_Q}_A.weight": down}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(InputError, match=r"configuration of the LoRA .* is damaged"):
        imported(tmp_path / "a.safetensors")


@pytest.mark.parametrize("alpha", ["NaN", "1e999", "-Infinity"])
def test_an_alpha_that_is_no_number_is_refused(alpha: str, tmp_path: Path) -> None:
    up, down = pair_of(2)
    tensors = {f"{PEFT_Q}_B.weight": up, f"{PEFT_Q}_A.weight": down}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": f'{{"unet.lora_alpha": {alpha}}}'})
    with pytest.raises(InputError, match="comes out as NaN or infinite numbers"):
        imported(tmp_path / "a.safetensors")


def test_wrong_words_embeddings_and_bases_are_said(base: Base, lora: Adapter, tmp_path: Path) -> None:
    path = export_kohya(lora, tmp_path / "a.safetensors").path
    with pytest.raises(InputError, match="token is empty"):
        imported(path, token=" ")
    save_file({name.replace(Q, K): tensor for name, tensor in GOOD.items()}, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match=r"Layer .* is \(64, 48\) in .* but \(64, 64\)"):
        imported(tmp_path / "b.safetensors", base=base)
    wide = {f"{K}.lora_up.weight": torch.ones(64, 2), f"{K}.lora_down.weight": torch.ones(2, 768)}
    save_file(wide, tmp_path / "c.safetensors")
    with pytest.raises(AdapterError, match=r"family 'sd1', .* is of family 'mini'"):
        imported(tmp_path / "c.safetensors", base=base)
    save_file({"emb_params": torch.ones(1, 1024)}, tmp_path / "e.safetensors")
    with pytest.raises(InputError, match="is 1024 wide, a LoRA of family 'sd1' needs 768"):
        imported(tmp_path / "c.safetensors", embedding=tmp_path / "e.safetensors")
    save_file({"emb_params": torch.full((1, 768), torch.nan)}, tmp_path / "e.safetensors")
    with pytest.raises(InputError, match="holds NaN"):
        imported(tmp_path / "c.safetensors", embedding=tmp_path / "e.safetensors")
    save_file({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(3, 1280)}, tmp_path / "e.safetensors")
    with pytest.raises(InputError, match=r"e\.safetensors' has .*3 vectors in 'clip_g'.*, which must be as many"):
        imported(tmp_path / "c.safetensors", embedding=tmp_path / "e.safetensors")
    with pytest.raises(InputError, match=r"is not the embedding of one token: it holds \d+ tensors"):
        imported(tmp_path / "c.safetensors", embedding=path)
    assert load_file(tmp_path / "c.safetensors").keys() == wide.keys()
