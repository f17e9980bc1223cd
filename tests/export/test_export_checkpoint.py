"""Merged checkpoints: both layouts hold the base plus the adapter, the base stays as it is, and nothing half-written remains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from exported_loras import (
    ENDINGS,
    PRECISIONS,
    PROJECTIONS,
    acting,
    load_tokens,
    made_of_probes,
    narrow_base,
    picture,
    picture_of_reader,
    random_lora,
    relative,
)
from narrow_bases import FAMILIES, NarrowBase
from random_adapters import random_adapter
from safetensors.torch import load_file
from tokenizers.models import BPE
from transformers import CLIPTokenizer

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.attach import attached
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base, load_base, tokenizer_name
from spectral_diffusion.errors import AdapterError, BaseError, InputError, StorageError
from spectral_diffusion.export import export_checkpoint, places
from spectral_diffusion.export.checkpoint import merged_pipeline


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, narrow_bases: dict[str, NarrowBase]) -> Base:
    return narrow_base(request.param, narrow_bases[request.param].folder)


@pytest.fixture(scope="module")
def sd1(narrow_bases: dict[str, NarrowBase]) -> Base:
    return narrow_base("sd1", narrow_bases["sd1"].folder)


def adapter_for(base: Base, endings: tuple[str, ...] = ENDINGS) -> Adapter:
    two = [random_adapter(base, vectors=2), random_adapter(base, token="<V2>", start=2)]
    return fuse([*two, random_lora(base, endings=endings)], method="sum")


def in_precision_of(dtype: torch.dtype, base: Base) -> Base:
    """Return `base` with weights that `dtype` holds exactly, as a checkpoint of that precision has them, in float32."""
    pipeline = merged_pipeline(base, None, dtype)
    for part in ("unet", "vae", *base.text_encoders):
        getattr(pipeline, part).float()
    return replace(base, pipeline=pipeline)


def weights_of(base: Base) -> dict[str, torch.Tensor]:
    """Return a copy of every weight of `base`."""
    parts = ("unet", "vae", *base.text_encoders)
    states = {part: getattr(base.pipeline, part).state_dict() for part in parts}
    return {f"{part}.{name}": tensor.clone() for part, state in states.items() for name, tensor in state.items()}


def pipeline_of(path: Path, base: Base) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Return what diffusers itself loads from `path`."""
    kind = StableDiffusionXLPipeline if base.family == "sdxl" else StableDiffusionPipeline
    options = {"safety_checker": None} if base.family != "sdxl" else {"add_watermarker": False}
    if path.is_dir():
        pipeline = kind.from_pretrained(path, **options)
    else:
        pipeline = kind.from_single_file(path, config=base.source, local_files_only=True, **options)
    pipeline.scheduler = base.pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    for model in (pipeline.unet, pipeline.vae):
        model.eval()
    return pipeline.to(torch.float32)


@pytest.mark.parametrize(
    ("name", "dtype", "endings"),
    [
        pytest.param("merged.safetensors", torch.float16, PROJECTIONS, id="half precision"),  # rounded convolutions show
        pytest.param("merged.safetensors", torch.float32, ENDINGS, id="file"),
        pytest.param("merged", torch.float32, ENDINGS, id="folder"),
    ],
)
def test_diffusers_loads_the_base_plus_the_adapter(
    name: str, dtype: torch.dtype, endings: tuple[str, ...], base: Base, tmp_path: Path
) -> None:
    adapter, base = adapter_for(base, endings), in_precision_of(dtype, base)  # its bands are those of the base as it came
    before = weights_of(base)
    export = export_checkpoint(adapter, base, tmp_path / name, dtype=dtype)
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights_of(base).items())
    assert {path.name for path in tmp_path.iterdir()} == {name, "V1.safetensors", "V2.safetensors"}
    merged = Base(pipeline=pipeline_of(export.path, base), family=base.family, fingerprint="", source="", embedded=False)
    deltas = adapter.deltas()
    old, new = acting(base, tuple(deltas)), acting(merged, tuple(deltas))
    for key, delta in deltas.items():
        wanted = old[key] + made_of_probes(delta)
        assert (new[key] - wanted).norm() / wanted.norm() < PRECISIONS[dtype], key
    load_tokens(merged, export)
    with attached(base, adapter):
        expected = picture(base, adapter)
    assert relative(picture_of_reader(merged), expected) < PRECISIONS[dtype]
    assert relative(picture(base, None), expected) > 0.01


def assert_read_by_transformers_4(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Check that the files of which transformers 4 makes its tokenizer make the one that transformers 5 has."""
    assert json.loads((folder / "vocab.json").read_text(encoding="utf-8")) == tokenizer.get_vocab()
    byte_pairs = BPE.from_file(
        str(folder / "vocab.json"), str(folder / "merges.txt"), end_of_word_suffix="</w>", unk_token="<|endoftext|>"
    )
    for word in ("dog", "unbelievably", "wxyz"):
        assert [token.id for token in byte_pairs.tokenize(word)] == tokenizer(word, add_special_tokens=False).input_ids


def test_what_nobody_changes_stays_bit_for_bit_and_loads_here(base: Base, tmp_path: Path) -> None:
    adapter = random_adapter(base)
    export = export_checkpoint(adapter, base, tmp_path / "merged", dtype=torch.float32)
    again = load_base(export.path, device="cpu")
    for part in base.text_encoders:
        names = load_file(export.path / part / "model.safetensors").keys()
        assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
        assert_read_by_transformers_4(base.tokenizers[part], export.path / tokenizer_name(part))
    assert again.family == base.family
    changed = {key for key in adapter.layer_keys() if key.startswith("unet.")}
    original = base.pipeline.unet.state_dict()
    for name, tensor in again.pipeline.unet.state_dict().items():
        assert torch.equal(tensor, original[name]) == (f"unet.{name.removesuffix('.weight')}" not in changed), name


def test_words_that_were_added_to_the_base_are_left_out_of_a_file(
    narrow_bases: dict[str, NarrowBase], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    narrow = narrow_bases["sd1"]
    grown = load_base(narrow.folder, device="cpu")
    grown.pipeline.load_textual_inversion(torch.ones(2, 32), token="<dot>")
    export = export_checkpoint(random_adapter(grown), grown, tmp_path / "merged.safetensors", dtype=torch.float32)
    assert "words <dot>, <dot>_1 are left out" in caplog.text
    again = load_base(export.path, device="cpu", configuration=narrow.configuration)
    words, known = (base.pipeline.text_encoder.get_input_embeddings().weight for base in (again, grown))
    assert torch.equal(words, known[:-2])


def test_the_embedded_base_is_merged_into_a_folder_only(tmp_path: Path) -> None:
    base = load_base(device="cpu")
    adapter = random_adapter(base)
    with pytest.raises(BaseError, match="save it as a folder"):
        export_checkpoint(adapter, base, tmp_path / "merged.safetensors")
    assert not list(tmp_path.iterdir())
    export_checkpoint(adapter, base, tmp_path / "merged")
    assert load_base(tmp_path / "merged", device="cpu").family == "mini"


def test_the_words_to_type_are_said(sd1: Base, tmp_path: Path) -> None:
    lines = places(export_checkpoint(random_adapter(sd1), sd1, tmp_path / "merged.safetensors"))
    assert "merged.safetensors into models/Stable-diffusion, V1.safetensors into embeddings; type: V1" in lines[0]
    assert "merged.safetensors into models/checkpoints, V1.safetensors into models/embeddings; type: embedding:V1" in lines[1]
    lines = places(export_checkpoint(random_adapter(sd1), sd1, tmp_path / "folder", overwrite=True))
    assert "nothing of the folder" in lines[0] and "models/diffusers" in lines[1]


def test_what_exists_is_replaced_only_when_asked_and_never_a_strange_folder(sd1: Base, tmp_path: Path) -> None:
    adapter = random_adapter(sd1)
    for path in (tmp_path / "merged", tmp_path / "merged.safetensors"):
        export_checkpoint(adapter, sd1, path, overwrite=True)
        with pytest.raises(InputError, match="exists already; give --force"):
            export_checkpoint(adapter, sd1, path)
    export_checkpoint(adapter, sd1, tmp_path / "merged", overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("precious")
    with pytest.raises(InputError, match="is no diffusers folder, so it is never replaced"):
        export_checkpoint(adapter, sd1, tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "1.jpg").read_text() == "precious"


@pytest.mark.parametrize("out", ["base", "base/../base/", "base/unet/a.safetensors", "base.safetensors", "V1.safetensors"])
def test_the_base_that_is_read_is_never_overwritten(out: str, narrow_bases: dict[str, NarrowBase], tmp_path: Path) -> None:
    narrow = narrow_bases["sd1"]
    source = tmp_path / ("base" if out.startswith("base/") or out == "base" else out)
    shutil.copytree(narrow.folder, source) if source.name == "base" else shutil.copy(narrow.file, source)
    base = replace(narrow_base("sd1", narrow.folder), source=str(source))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    path = tmp_path / ("merged.safetensors" if out == "V1.safetensors" else out)  # of which the embedding stands beside it
    with pytest.raises(InputError, match=r"would overwrite the base '.*', which is read by this export; choose another --out"):
        export_checkpoint(random_adapter(base), base, path, overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_folder_that_holds_the_base_is_not_replaced(narrow_bases: dict[str, NarrowBase], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(narrow_bases["sd1"].folder, tmp_path / "released"))
    file = Path(shutil.copy(narrow_bases["sd1"].file, folder / "released.safetensors"))
    base = replace(narrow_base("sd1", folder), source=str(file))
    with pytest.raises(InputError, match="would overwrite the base"):
        export_checkpoint(random_adapter(base), base, folder, overwrite=True)
    assert file.is_file()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """While entered, the system lets no file of this process grow beyond `size` bytes: a disk that fills up in the middle."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", ["merged", "merged.safetensors"])
def test_a_disk_that_fills_up_leaves_what_was_there_and_nothing_else(name: str, sd1: Base, tmp_path: Path) -> None:
    adapter, path = random_adapter(sd1), tmp_path / name
    with files_of_at_most(500_000), pytest.raises(StorageError, match=r"merged.*could not be written .*free some space"):
        export_checkpoint(adapter, sd1, path)
    assert not list(tmp_path.iterdir())
    export_checkpoint(adapter, sd1, path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert max(map(len, before.values())) > 1_000_000
    with files_of_at_most(500_000), pytest.raises(StorageError, match=r"merged.*could not be written .*free some space"):
        export_checkpoint(adapter.scaled(0.5), sd1, path, overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_an_adapter_of_another_family_and_huge_weights_are_refused(sd1: Base, tmp_path: Path) -> None:
    adapter = random_adapter(sd1)
    with pytest.raises(AdapterError, match=r"too large for torch\.float16"):
        export_checkpoint(adapter.scaled(1e9), sd1, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="is of family 'mini'"):
        export_checkpoint(adapter, load_base(device="cpu"), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_the_base_is_held_once_more_and_no_more(sd1: Base) -> None:
    """Weights that nobody changes are shared with the base when the precision is its own."""
    adapter = random_adapter(sd1)
    merged = merged_pipeline(sd1, adapter, torch.float32)
    own = {parameter.data_ptr() for parameter in sd1.pipeline.unet.parameters()}
    shared = [parameter.data_ptr() in own for parameter in merged.unet.parameters()]
    assert shared.count(False) == sum(key.startswith("unet.") for key in adapter.layer_keys())
    assert merged.unet is not sd1.pipeline.unet
