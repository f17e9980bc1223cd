"""Export: every key is one that other tools map, and what they load is what the library holds in memory."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import ExifTags, Image
from random_adapters import random_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spectral_diffusion.adapters.adapter import Adapter, ConceptPart
from spectral_diffusion.adapters.adapter_file import load_adapter, save_adapter
from spectral_diffusion.adapters.fit import layer_group
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base
from spectral_diffusion.bases.layer_names import kohya_name, peft_name
from spectral_diffusion.errors import AdapterError, InputError, StorageError
from spectral_diffusion.export import Export, export_diffusers, export_embeddings, export_kohya, places
from spectral_diffusion.export.embedding import embedding_file_name
from spectral_diffusion.joining import weighted_sum
from spectral_diffusion.reports.exactness import export_error, fusion_error

HALF_PRECISION = 1e-3
"""Largest relative difference of a delta written in float16 (issue 2, exactness)."""

SINGLE_PRECISION = 1e-5
"""The same for float32 (issue 3, proof)."""

READABLE_KEY = re.compile(
    r"(lora_unet_(down_blocks|up_blocks|mid_block)_(\d_)?attentions_\d_transformer_blocks_\d_attn[12]_to_(q|k|v|out_0)"
    r"|lora_te_text_model_encoder_layers_\d+_self_attn_(q|k|v|out)_proj)\.(lora_down\.weight|lora_up\.weight|alpha)"
)
"""The keys that every reader maps (formats.md)."""


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
    names = load_file(export.path).keys()
    assert not [name for name in names if not READABLE_KEY.fullmatch(name)]
    assert len(names) == 3 * len(pair.layer_keys())


def test_the_file_holds_one_alpha_and_matrices_of_one_rank(export: Export) -> None:
    tensors = load_file(export.path)
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
    tensors = load_file(export.path)
    assert {tensor.shape[1] for name, tensor in tensors.items() if name.endswith("lora_up.weight")} == {8}
    assert export_error(base, fused, export.path) < HALF_PRECISION


def test_the_metadata_is_complete(export: Export) -> None:
    with safe_open(export.path, "pt") as file:
        metadata = file.metadata()
    content = export.path.read_bytes()
    payload = content[8 + int.from_bytes(content[:8], "little") :]
    expected = {
        "ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_network_module": "networks.lora", "ss_network_dim": "7",
        "ss_network_alpha": "7.0", "ss_output_name": "my pair", "sshs_model_hash": hashlib.sha256(payload).hexdigest(),
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "my pair", "modelspec.resolution": "64x64", "modelspec.trigger_phrase": "V1, Kätzchen",
        "modelspec.prediction_type": "epsilon",
    }  # fmt: skip
    assert {key: metadata.get(key) for key in expected} == expected
    assert metadata.keys() - expected.keys() == {"ss_tag_frequency", "modelspec.date", "modelspec.description"}
    assert set(json.loads(metadata["ss_tag_frequency"])["spectral-diffusion"]) == {"V1", "Kätzchen"}
    assert export.words == {"<V1>": "V1", "<Kätzchen>": "Kätzchen"}


def test_the_side_file_holds_the_words_to_type(export: Export) -> None:
    (description,) = export.side_files
    assert description == export.path.with_suffix(".json")
    record = json.loads(description.read_text(encoding="utf-8"))
    assert record == {"activation text": "V1 and Kätzchen", "preferred weight": 1.0, "sd version": "SD1"}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("sd1", ("sd_v1", "False", "stable-diffusion-v1/lora", "512x512", "SD1")),
        ("sd2", ("sd_v2", "True", "stable-diffusion-v2-512/lora", "512x512", "SD2")),
        ("sdxl", ("sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora", "1024x1024", "SDXL")),
    ],
)
def test_every_family_is_called_by_its_name(family: str, expected: tuple[str, ...], pair: Adapter, tmp_path: Path) -> None:
    export = export_kohya(replace(pair, family=family), tmp_path / "a.safetensors")
    with safe_open(export.path, "pt") as file:
        metadata = file.metadata()
    names = "ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.resolution"
    version = json.loads(export.side_files[0].read_text(encoding="utf-8"))["sd version"]
    assert (*(metadata[name] for name in names), version) == expected


@pytest.mark.parametrize(
    ("family", "predicts", "expected"),
    [
        ("sd2", "v_prediction", ("stable-diffusion-v2-768-v/lora", "768x768", "v")),
        ("sd2", "epsilon", ("stable-diffusion-v2-512/lora", "512x512", "epsilon")),
        ("sd2", "", ("stable-diffusion-v2-512/lora", "512x512", None)),
        ("sdxl", "v_prediction", ("stable-diffusion-xl-v1-base/lora", "1024x1024", "v")),
    ],
)
def test_the_metadata_says_what_the_base_predicts(
    family: str, predicts: str, expected: tuple[str | None, ...], pair: Adapter, tmp_path: Path
) -> None:
    save_adapter(replace(pair, family=family, prediction_type=predicts), tmp_path / "adapter.safetensors")
    adapter = load_adapter(tmp_path / "adapter.safetensors")
    assert adapter.prediction_type == predicts
    with safe_open(export_kohya(adapter, tmp_path / "a.safetensors").path, "pt") as file:
        metadata = file.metadata()
    names = "modelspec.architecture", "modelspec.resolution", "modelspec.prediction_type"
    assert tuple(metadata.get(name) for name in names) == expected


def test_the_export_check_sees_a_wrong_file(base: Base, pair: Adapter, tmp_path: Path) -> None:
    export = export_kohya(pair.scaled(1.01), tmp_path / "pair.safetensors")
    assert export_error(base, pair, export.path) == pytest.approx(0.01, rel=0.2)
    assert export_error(base, pair.scaled(1.01), export.path) < HALF_PRECISION


def test_the_fusion_check_is_exact(base: Base) -> None:
    adapters = [random_adapter(base, token=f"<V{n}>", start=2 * n, seed=n, measured=True) for n in (1, 2)]
    assert fusion_error(base, fuse(adapters)) < 1e-5


def test_the_fusion_check_sees_a_wrong_change_however_small_it_is_beside_the_base(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = random_adapter(base)
    (concept,) = adapter.concepts
    for part in concept.layers.values():
        for tensor in part.tensors.values():
            tensor.mul_(1e-4)
    assert fusion_error(base, adapter) < 1e-5
    right = ConceptPart.delta
    monkeypatch.setattr(ConceptPart, "delta", lambda self, key: weighted_sum([right(self, key)], [1.01]))
    assert fusion_error(base, adapter) == pytest.approx(0.01, rel=0.1)


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
        ("<NUL>", "NUL_"),
        ("<com1>", "com1_"),
        ("<" + "𠮷" * 90 + ">", "𠮷" * 30),
        ("<.>", "token-" + hashlib.sha256(b"<.>").hexdigest()[:8]),
    ],
)
def test_a_token_becomes_a_file_name_that_every_file_system_takes(token: str, name: str) -> None:
    assert embedding_file_name(token) == name


def test_tokens_and_the_lora_never_share_a_file(base: Base, tmp_path: Path) -> None:
    adapters = [random_adapter(base, token=token, start=2 * n) for n, token in enumerate(("<V1>", "V1", "<pair>"))]
    export = export_kohya(fuse(adapters, method="sum"), tmp_path / "Pair.safetensors")
    assert export.words == {"<V1>": "V1", "V1": "V1-2", "<pair>": "pair-2"}
    assert all(load_file(file).keys() == {"emb_params"} for file in export.embeddings.values())
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_numbers_too_large_for_half_precision_are_refused(pair: Adapter, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"too large for torch\.float16; lower the strengths"):
        export_kohya(pair.scaled(1e12), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_every_embedding_has_a_file_of_its_own(pair: Adapter, tmp_path: Path) -> None:
    one = pair.concepts[0]
    tokens = ("cat-2", "<cat>", "cat")
    adapter = replace(pair, concepts=tuple(replace(one, token=token) for token in tokens), weights=(1.0,) * 3)
    files = export_embeddings(adapter, tmp_path).embeddings
    assert [files[token].name for token in tokens] == ["cat-2.safetensors", "cat.safetensors", "cat-3.safetensors"]


def test_an_embedding_never_overwrites_an_adapter_of_its_name(pair: Adapter, tmp_path: Path) -> None:
    save_adapter(pair, tmp_path / "V1.safetensors")
    with pytest.raises(AdapterError, match="would overwrite the adapter"):
        export_kohya(pair, tmp_path / "pair.safetensors")
    assert load_adapter(tmp_path / "V1.safetensors").tokens == pair.tokens
    assert not (tmp_path / "pair.safetensors").exists()


def test_a_smaller_rank_is_the_nearest_and_its_error_is_said(base: Base, pair: Adapter, tmp_path: Path) -> None:
    deltas = pair.deltas()
    for format in (export_kohya, export_diffusers):
        export = format(pair, tmp_path / f"{format.__name__}.safetensors", rank=3, dtype=torch.float32, overwrite=True)
        assert export.rank == 3
    tensors = load_file(tmp_path / "export_kohya.safetensors")
    lost, whole = {}, {}
    for key, delta in deltas.items():
        U, s, Vh = torch.linalg.svd(delta.dense().double(), full_matrices=False)
        nearest = U[:, :3] * s[:3] @ Vh[:3]
        name = kohya_name(key, "mini")
        written = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
        assert (written - nearest).norm() / nearest.norm() < SINGLE_PRECISION
        for group in (layer_group(key), "overall"):
            lost[group] = lost.get(group, 0) + float((delta.dense() - written).double().square().sum())
            whole[group] = whole.get(group, 0) + float(delta.dense().double().square().sum())
    assert list(export.errors) == ["text encoder", "UNet down", "UNet mid", "UNet up", "overall"]
    assert export.errors == pytest.approx({group: (lost[group] / whole[group]) ** 0.5 for group in lost}, rel=1e-3)
    assert 0.05 < export.errors["overall"] < 1
    exact = export_kohya(pair, tmp_path / "exact.safetensors", rank=7, overwrite=True)
    assert max(exact.errors.values()) < 1e-6
    assert export_error(base, pair, exact.path) < HALF_PRECISION


@pytest.mark.parametrize("rank", [0, -1, 8])
def test_ranks_that_make_no_sense_are_refused(rank: int, pair: Adapter, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"rank must be from 1 to 7, the adapter's own, got {rank}"):
        export_kohya(pair, tmp_path / "a.safetensors", rank=rank)
    assert not list(tmp_path.iterdir())


def test_each_concept_has_a_strength(base: Base, pair: Adapter, tmp_path: Path) -> None:
    weaker = pair.strengthened({"<V1>": 0.5})
    assert weaker.weights == (0.5, 0.7)
    assert export_error(base, weaker, export_kohya(weaker, tmp_path / "a.safetensors").path) < HALF_PRECISION
    with pytest.raises(AdapterError, match="has no concept '<V9>'; its tokens are <V1>, <Kätzchen>"):
        pair.strengthened({"<V9>": 0.5})


def test_a_preview_picture_stands_beside_the_lora(pair: Adapter, tmp_path: Path) -> None:
    Image.new("RGBA", (8, 6), (255, 0, 0, 255)).save(tmp_path / "drawn.webp")
    export = export_kohya(pair, tmp_path / "lora" / "a.safetensors", preview=tmp_path / "drawn.webp")
    assert [path.name for path in export.side_files] == ["a.json", "a.png"]
    with Image.open(tmp_path / "lora" / "a.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (8, 6))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match=r"The preview cannot be read\. '.*text\.png': The file is damaged or no picture"):
        export_kohya(pair, tmp_path / "b.safetensors", preview=tmp_path / "text.png")
    assert not (tmp_path / "b.safetensors").exists()
    preview = tmp_path / "lora" / "a.png"
    with pytest.raises(InputError, match=r"preview '.*a\.png' lies where its copy is written"):
        export_kohya(pair, tmp_path / "lora" / "a.safetensors", preview=preview, overwrite=True)


def test_a_preview_is_read_as_a_photo_is(pair: Adapter, tmp_path: Path) -> None:
    lying = Image.new("RGB", (40, 20))
    lying.getexif()[ExifTags.Base.Orientation] = 6
    lying.save(tmp_path / "phone.jpg", exif=lying.getexif())
    Image.new("RGBA", (8, 8)).save(tmp_path / "clear.png")
    shown = {}
    for name in ("phone.jpg", "clear.png"):
        export = export_kohya(pair, tmp_path / f"{name}.safetensors", preview=tmp_path / name, overwrite=True)
        with Image.open(export.side_files[1]) as picture:
            shown[name] = picture.size, picture.getpixel((0, 0))
    assert shown == {"phone.jpg": ((20, 40), (0, 0, 0)), "clear.png": ((8, 8), (255, 255, 255))}


def test_the_diffusers_file_holds_its_keys_and_nothing_else(pair: Adapter, tmp_path: Path) -> None:
    export = export_diffusers(pair, tmp_path / "a.safetensors")
    expected = {f"{peft_name(key)}.lora_{side}.weight" for key in pair.layer_keys() for side in "AB"}
    assert load_file(export.path).keys() == expected
    assert all(name.startswith(("unet.", "text_encoder.text_model.encoder.layers.")) for name in expected)


def test_the_lines_say_where_the_files_go_and_what_to_type(pair: Adapter, tmp_path: Path) -> None:
    a1111, comfy = places(export_kohya(pair, tmp_path / "pair.safetensors"))
    files = "V1.safetensors, Kätzchen.safetensors into"
    assert a1111 == (
        f"AUTOMATIC1111: put pair.safetensors, pair.json into models/Lora, {files} embeddings; "
        "type: <lora:pair:1> V1 and Kätzchen"
    )
    assert comfy == (
        f"ComfyUI: put pair.safetensors into models/loras, {files} models/embeddings; "
        "type: embedding:V1 and embedding:Kätzchen (with the LoRA loaded)"
    )
    for line in places(export_embeddings(pair, tmp_path / "tokens")):
        assert files in line and "V1" in line.partition("type: ")[2]
    export = export_diffusers(pair, tmp_path / "b.safetensors", overwrite=True)
    assert "--format kohya" in places(export)[0]
    assert places(export)[1] == (  # as `test_export_readers` loads and types them
        "diffusers: load b.safetensors with load_lora_weights, "
        'V1.safetensors with load_textual_inversion and token="<v1>", '
        'Kätzchen.safetensors with load_textual_inversion and token="<kätzchen>"; type: <v1> and <kätzchen>'
    )
    loaded = places(replace(export, family="sdxl"))[1]
    assert 'f["clip_l"] with text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer, and' in loaded
    assert 'f["clip_g"] with text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2' in loaded


@pytest.mark.parametrize("name", ["pair.safetensors", "pair.json", "V1.safetensors"])
def test_what_exists_is_overwritten_only_when_asked(name: str, pair: Adapter, tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(InputError, match=f"{name}' exists already; give --force"):
        export_kohya(pair, tmp_path / "pair.safetensors")
    assert (tmp_path / name).read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    export_kohya(pair, tmp_path / "pair.safetensors", overwrite=True)
    assert (tmp_path / name).read_bytes() != before


def test_a_full_disk_leaves_nothing_behind(pair: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_is_full(tensors: object, path: Path, *rest: object) -> None:
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("spectral_diffusion.export.kohya.save_file", disk_is_full)
    with pytest.raises(StorageError, match=r"pair\.safetensors' could not be written .*No space left"):
        export_kohya(pair, tmp_path / "pair.safetensors")
    assert not list(tmp_path.iterdir())
