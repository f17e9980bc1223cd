"""Adapter files: what is saved comes back, and nothing else is let in."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Trap
from random_adapters import FORMS, Description, assert_same, assert_same_in_half_precision, random_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shared_bases import BASES, shared_base

from spectral_diffusion.adapters.adapter import Adapter, LayerPart
from spectral_diffusion.adapters.adapter_file import load_adapter, save_adapter
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.errors import AdapterError, StorageError

Tensors = dict[str, torch.Tensor]
LAYER = "0/layers/unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def pair(tiny_base_folder: Path) -> Adapter:
    """Two measured concepts with names from all over the world, fused."""
    base = shared_base("tiny", tiny_base_folder)
    dog = random_adapter(base, token="<Hündchen-狗>", vectors=2, measured=True)
    cat = random_adapter(base, "rotational", token="<V2>", start=2, measured=True, seed=1)
    return fuse([dog, cat], strengths=[1.0, 0.25])


@pytest.fixture
def file(pair: Adapter, tmp_path: Path) -> Path:
    path = tmp_path / "ein schönes Paar 犬.safetensors"
    save_adapter(pair, path)
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", BASES)
def test_an_adapter_comes_back_under_another_seed(which: str, form: str, tiny_base_folder: Path, tmp_path: Path) -> None:
    adapter = random_adapter(shared_base(which, tiny_base_folder), form, measured=True)
    save_adapter(adapter, tmp_path / "a.safetensors")
    torch.manual_seed(999)
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert_same_in_half_precision(loaded, adapter)
    save_adapter(loaded, tmp_path / "b.safetensors")
    assert_same(load_adapter(tmp_path / "b.safetensors"), loaded)


def test_a_fused_adapter_comes_back_and_gives_the_same_deltas(pair: Adapter, file: Path) -> None:
    loaded = load_adapter(file)
    assert_same_in_half_precision(loaded, pair)
    assert (loaded.tokens, loaded.weights, loaded.method) == (("<Hündchen-狗>", "<V2>"), (1.0, 0.25), "aligned")
    deltas = loaded.deltas()
    for key, delta in pair.deltas().items():
        assert (deltas[key].dense() - delta.dense()).norm() / delta.dense().norm() < 1e-3  # float16's rounding of the factors


def test_a_file_of_an_earlier_release_is_read(pair: Adapter, file: Path) -> None:
    """It held more of the activations, in float32, and did not say what its base predicts."""
    earlier = {
        f"{number}/activations/{group}": torch.randn(len(factor), 48, generator=torch.Generator().manual_seed(2))
        for number, concept in enumerate(pair.concepts)
        for group, factor in concept.activations.items()
    }
    rewrite(file, lambda tensors, description: (tensors.update(earlier), description.pop("prediction_type")))
    loaded = load_adapter(file)
    assert loaded.prediction_type == ""
    for name, factor in earlier.items():
        number, _, group = name.split("/")
        assert torch.equal(loaded.concepts[int(number)].activations[group], factor)
    assert all(delta.dense().isfinite().all() for delta in loaded.deltas().values())


def test_numbers_too_large_for_half_precision_are_kept(pair: Adapter, tmp_path: Path) -> None:
    large = {key: replace(part, tensors=part.tensors | {"A": part.tensors["A"] * 1e9}) for key, part in layers(pair).items()}
    adapter = replace(pair.only(pair.tokens[:1]), concepts=(replace(pair.concepts[0], layers=large),))
    save_adapter(adapter, tmp_path / "a.safetensors")
    loaded = layers(load_adapter(tmp_path / "a.safetensors"))
    assert all(torch.equal(loaded[key].tensors["A"], part.tensors["A"]) for key, part in large.items())


def layers(adapter: Adapter) -> dict[str, LayerPart]:
    return adapter.concepts[0].layers


def rewrite(file: Path, change: Callable[[Tensors, Description], object]) -> None:
    """Let `change` alter the tensors and the description in `file`."""
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    description = json.loads(metadata["adapter"])
    change(tensors, description)
    save_file(tensors, file, metadata | {"adapter": json.dumps(description)})


def put(name: str, tensor: torch.Tensor | None) -> Callable[[Tensors, Description], None]:
    """Put `tensor` at `name`; take it out when there is none."""

    def change(tensors: Tensors, description: Description) -> None:
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    return change


def say(**what: Any) -> Callable[[Tensors, Description], None]:
    """Say `what` of the file."""
    return lambda tensors, description: description.update(what)


def say_of_concept(**what: Any) -> Callable[[Tensors, Description], None]:
    """Say `what` of the first concept."""
    return lambda tensors, description: description["concepts"][0].update(what)


def drop_layers(tensors: Tensors, description: Description) -> None:
    for name in [name for name in tensors if name.startswith("0/layers/")]:
        del tensors[name]


def drop_activations(tensors: Tensors, description: Description) -> None:
    for name in [name for name in tensors if name.startswith("1/activations/")]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(f"{LAYER}/A", torch.full((64, 2), torch.nan)), "to_q/A' holds NaN or infinite numbers"),
        (
            put("0/embeddings/text_encoder", torch.full((2, 48), torch.inf)),
            "text_encoder' holds NaN or infinite numbers",
        ),
        (put(f"{LAYER}/c", torch.full((2,), 1e300, dtype=torch.float64)), "holds NaN or infinite numbers"),
        (put(f"{LAYER}/A", torch.zeros(64, 2, dtype=torch.int32)), "holds torch.int32 instead of"),
        (put(f"{LAYER}/A", torch.zeros(64, 3)), r"'A' of layer .*shape \(64, 3\), expected \(64, 2\)"),
        (put(f"{LAYER}/B", torch.zeros(2)), r"'B' of layer .*shape \(2,\), expected \(64, 2\)"),
        (put(f"{LAYER}/U", torch.zeros(64, 5)), "does not have 2 directions"),
        (put(f"{LAYER}/s", torch.zeros(2, 2)), "does not have 2 directions"),
        (put(f"{LAYER}/s", torch.zeros(())), "does not have 2 directions"),
        (put(f"{LAYER}/V", None), r"layer 'unet\..*to_q' holds .*expected \['A', 'B', 'U', 'V', 'c', 's'\]"),
        (put(f"{LAYER}/Q_U", torch.zeros(2, 2)), r"to_q' holds .*'Q_U'"),
        (put("0/embeddings/text_encoder", None), "concept .* has no embedding"),
        (put("0/embeddings/text_encoder_2", torch.zeros(3, 8)), "embeddings of .* have differing numbers of vectors"),
        (put("0/embeddings/unet", torch.zeros(2, 8)), "'0/embeddings/unet' has a name that no adapter has"),
        (put("0/embeddings/text_encoder", torch.zeros(48)), r"embedding of .* has shape \(48,\), expected \(n, width\)"),
        (put("0/embeddings/text_encoder", torch.zeros(0, 48)), r"embedding of .* has shape \(0, 48\)"),
        (put("0/activations/text", torch.zeros(5, 4)), r"activations of layer .*shape \(5, 4\), expected \(48, k\)"),
        (put("0/layers/../../etc/passwd/A", torch.zeros(1)), "'0/layers/../../etc/passwd/A' has a name that no"),
        (put("0/layers/unet./etc/A", torch.zeros(1)), "has a name that no adapter has"),
        (put("0/activations/..", torch.zeros(1)), "has a name that no adapter has"),
        (put("0/pickle", torch.zeros(1)), "has a name that no adapter has"),
        (put("2/embeddings/text_encoder", torch.zeros(1, 48)), "tensors that do not belong there: 2/embeddings/text_encoder"),
        (put("/etc/passwd", torch.zeros(1)), "tensors that do not belong there: /etc/passwd"),
        (drop_layers, "changes no layer"),
        (drop_activations, "'<V2>' carries no measured activations"),
        (say(version=2), "written by a newer version .*update this program"),
        (say(version="new"), "description is damaged"),
        (say(concepts=[]), "it holds no concept"),
        (say(concepts={"a": 1}), "description is damaged"),
        (say(concepts=7), "description is damaged"),
        (say(method="mean"), "'mean' is not a way to join"),
        (say(prediction_type="sample"), "'sample' is nothing that a base predicts"),
        (say_of_concept(band=[0, 0]), "rank of a band must be at least 1"),
        (say_of_concept(band=[-1, 2]), "must start at direction 0 or later"),
        (say_of_concept(band=[0, 3]), "does not have 3 directions"),
        (say_of_concept(band="0-1"), "description is damaged"),
        (say_of_concept(parametrisation="os.system"), "parametrisation 'os.system' is unknown"),
        (say_of_concept(weight=float("nan")), "Strengths must be numbers, got nan"),
        (say_of_concept(weight="strong"), "description is damaged"),
        (say_of_concept(token="<v2>"), "Two concepts use the token '<v2>'"),
        (say_of_concept(settings="none"), "description is damaged"),
        (say_of_concept(settings={"among": 5}), "setting 'among' of '.*' is 5, expected a list of tokens; train it again"),
        (say_of_concept(settings={"among": [1]}), r"setting 'among' of '.*' is \[1\], expected a list"),
        (say_of_concept(settings={"mixing": "much"}), "setting 'mixing' of '.*' is 'much', expected a number"),
        (say_of_concept(settings={"steps_done": None}), "setting 'steps_done' of '.*' is None, expected a number"),
        (say(family="flux"), "family 'flux' is none of sd1, sd2, sdxl, mini; update this program"),
        (say(family=["sd1"]), r"family '\['sd1'\]' is none of"),
    ],
)
def test_a_hostile_file_is_refused_with_its_name_and_the_reason(
    change: Callable[[Tensors, Description], None], message: str, file: Path
) -> None:
    rewrite(file, change)
    with pytest.raises(AdapterError, match=f"(?s)ein schönes Paar 犬.*{message}"):
        load_adapter(file)


@pytest.mark.parametrize("description", ["{", "null", "[" * 100_000, '"text"'])
def test_a_description_that_is_none_is_refused(description: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    metadata = {"format": "spectral-diffusion-adapter", "adapter": description}
    save_file({"0/embeddings/text_encoder": torch.zeros(1, 4)}, path, metadata)
    with pytest.raises(AdapterError, match="its description is damaged"):
        load_adapter(path)
    save_file({"0/embeddings/text_encoder": torch.zeros(1, 4)}, path, {"format": "spectral-diffusion-adapter"})
    with pytest.raises(AdapterError, match="its description is damaged"):
        load_adapter(path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=["empty", "length", "header", "all but a byte"])
def test_a_truncated_file_is_refused(kept: int, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(AdapterError, match=r"犬\.safetensors' is damaged or not a safetensors file .*copy it again"):
        load_adapter(file)


def test_a_header_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(AdapterError, match="is damaged or not a safetensors file"):
        load_adapter(path)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    for name in ("lora_unet_x.alpha", "decoder.conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight", "emb_params"):
        save_file({name: torch.zeros(1)}, path, {"format": "pt"})
        with pytest.raises(AdapterError, match=r"other\.safetensors' is not an adapter of this program; .*LoRA by 'spectral"):
            load_adapter(path)
    torch.save({"0/embeddings/text_encoder": Trap(tmp_path / "made")}, path)
    with pytest.raises(AdapterError, match=r"other\.safetensors' is damaged or not a safetensors file"):
        load_adapter(path)
    assert not (tmp_path / "made").exists()
    for nothing in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(AdapterError, match="There is no adapter file"):
            load_adapter(nothing)


@pytest.mark.parametrize("place", ["spectral_diffusion.adapters.adapter_file.save_file", "os.fsync", "os.replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    place: str, pair: Adapter, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()

    def disk_is_full(first: Any, path: Any = None, *rest: Any) -> None:
        if place.endswith("save_file"):
            Path(path).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(place, disk_is_full)
    with pytest.raises(StorageError, match=r"could not be written .*No space left.* free some space"):
        save_adapter(pair, file)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_a_folder_that_cannot_be_made_is_said(pair: Adapter, file: Path) -> None:
    with pytest.raises(StorageError, match=r"a\.safetensors' could not be written"):
        save_adapter(pair, file / "a.safetensors")
