"""Diffusers folders and hub ids: what is there is read, what is missing is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from checkpoints import Trap, assert_same_weights
from narrow_bases import NarrowBase, change_json
from safetensors.torch import load_file, save_file

from spectral_diffusion.bases.base import load_base
from spectral_diffusion.bases.checkpoint import hub_folder, load_folder
from spectral_diffusion.errors import BaseError


def copied(narrow: NarrowBase, place: Path) -> Path:
    return Path(shutil.copytree(narrow.folder, place / "a folder"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"])
@pytest.mark.parametrize("missing", ["folder", "content"])
def test_a_missing_part_is_named(part: str, missing: str, narrow_bases: dict[str, NarrowBase], tmp_path: Path) -> None:
    folder = copied(narrow_bases["sdxl"], tmp_path)
    shutil.rmtree(folder / part)
    if missing == "content":
        (folder / part).mkdir()
    with pytest.raises(BaseError, match=f"The base '.*a folder' lacks its part '{part}'; copy or download the whole folder"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("file", "values", "sentence"),
    [
        ("unet/config.json", {"in_channels": 9}, "is an inpainting checkpoint"),
        (
            "model_index.json",
            {"transformer": ["diffusers", "FluxTransformer2DModel"], "_class_name": "FluxPipeline"},
            "FluxPipeline",
        ),
        ("model_index.json", {"text_encoder": [None, None]}, "is the SDXL refiner"),
        (
            "model_index.json",
            {"unet": ["my_code", "UNet"]},
            r"wants code of its own \('my_code'\) for its 'unet', which is never run",
        ),
        ("model_index.json", {"vae": [None, None]}, "lacks its part 'vae'"),
    ],
)
def test_a_folder_of_another_kind_is_said(
    file: str, values: dict[str, object], sentence: str, narrow_bases: dict[str, NarrowBase], tmp_path: Path
) -> None:
    folder = copied(narrow_bases["sdxl"], tmp_path)
    change_json(folder / file, **values)
    with pytest.raises(BaseError, match=sentence):
        load_folder(folder)


@pytest.mark.parametrize(
    "file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "model_index.json"]
)
def test_a_damaged_folder_is_said(file: str, narrow_bases: dict[str, NarrowBase], tmp_path: Path) -> None:
    folder = copied(narrow_bases["sd1"], tmp_path)
    (folder / file).write_bytes((folder / file).read_bytes()[:99])
    with pytest.raises(BaseError, match=r"The base '.*a folder' is damaged.*fetch the folder again"):
        load_folder(folder)


@pytest.mark.parametrize(("part", "name"), [("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")])
def test_code_in_a_folder_never_runs(part: str, name: str, narrow_bases: dict[str, NarrowBase], tmp_path: Path) -> None:
    folder, created = copied(narrow_bases["sd1"], tmp_path), tmp_path / "created"
    for path in (folder / part).glob("*.safetensors"):
        path.unlink()
    torch.save({"weight": Trap(created)}, folder / part / name)
    with pytest.raises(BaseError, match="is damaged"):
        load_folder(folder)
    assert not created.exists()


def test_a_folder_in_half_precision_only_is_read(narrow_bases: dict[str, NarrowBase], tmp_path: Path) -> None:
    narrow = narrow_bases["sd1"]
    folder = copied(narrow, tmp_path)
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        tensors = load_file(folder / part / f"{stem}.safetensors")
        save_file(
            {name: tensor.half() for name, tensor in tensors.items()},
            folder / part / f"{stem}.fp16.safetensors",
            {"format": "pt"},
        )
        (folder / part / f"{stem}.safetensors").unlink()
    expected = {name: tensor.half() for name, tensor in narrow.pipeline.unet.state_dict().items()}
    assert_same_weights(load_folder(folder).unet.state_dict(), expected)
    loaded = load_base(folder, device="cpu")
    assert_same_weights(loaded.pipeline.unet.state_dict(), {name: tensor.float() for name, tensor in expected.items()})
    assert loaded.pipeline.text_encoder.dtype == loaded.pipeline.vae.dtype == torch.float32


def test_where_both_precisions_are_the_whole_one_is_read(narrow_bases: dict[str, NarrowBase], tmp_path: Path) -> None:
    folder = copied(narrow_bases["sd1"], tmp_path)
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(plain).items()}
    save_file(half, plain.with_name("diffusion_pytorch_model.fp16.safetensors"), {"format": "pt"})
    assert_same_weights(load_folder(folder).unet.state_dict(), narrow_bases["sd1"].pipeline.unet.state_dict())


@pytest.mark.parametrize(
    ("kind", "values"),
    [("EDMDPMSolverMultistepScheduler", {}), ("EulerDiscreteScheduler", {"timestep_type": "continuous"})],
)
def test_another_noise_schedule_is_refused(
    kind: str, values: dict[str, str], narrow_bases: dict[str, NarrowBase], tmp_path: Path
) -> None:
    folder = copied(narrow_bases["sdxl"], tmp_path)
    shutil.rmtree(folder / "scheduler")
    getattr(diffusers, kind)(**values).save_pretrained(folder / "scheduler")
    change_json(folder / "model_index.json", scheduler=["diffusers", kind])
    with pytest.raises(BaseError, match=rf"is a base for another noise schedule \({kind}\); give one of the plain kind"):
        load_folder(folder)


def test_a_hub_id_that_is_not_here_says_what_to_download() -> None:
    with pytest.raises(
        BaseError,
        match=r"'someone/a-model' is no file or folder.*'hf download someone/a-model --local-dir FOLDER'",
    ) as caught:
        load_base("someone/a-model")
    assert "\n" not in str(caught.value)
    for nothing in ("./missing", "missing.safetensors", "folder/missing.ckpt", "/nowhere/at/all", "x"):
        with pytest.raises(BaseError, match=f"There is no file or folder '{nothing}'; give a diffusers folder"):
            load_base(nothing)


def test_a_hub_id_that_is_cached_needs_no_network(
    narrow_bases: dict[str, NarrowBase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--someone--a-model"
    shutil.copytree(narrow_bases["sd1"].folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert hub_folder("someone/a-model").samefile(place / "snapshots" / commit)
