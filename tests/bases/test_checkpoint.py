"""Checkpoint files: every weight comes in and goes out again."""

from __future__ import annotations

import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from accelerate import init_empty_weights
from checkpoints import UNET, assert_same_weights
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from narrow_bases import FAMILIES, NarrowBase, save_original
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from spectral_diffusion.bases.base import load_base, read_base
from spectral_diffusion.bases.checkpoint import load_single_file, to_original_layout
from spectral_diffusion.bases.checkpoint.checkpoint_file import Checkpoint
from spectral_diffusion.bases.checkpoint.clip_tokenizer import clip_tokenizer
from spectral_diffusion.bases.checkpoint.original_layout import pipeline_parts, places
from spectral_diffusion.bases.checkpoint.recognition import prediction_type_of
from spectral_diffusion.bases.checkpoint.single_file import CONFIGURATIONS
from spectral_diffusion.errors import BaseError

SIZES = {
    ("sd1", "unet"): 859_520_964,
    ("sd2", "unet"): 865_910_724,
    ("sdxl", "unet"): 2_567_463_684,
    ("sd1", "vae"): 83_653_863,
    ("sd1", "text_encoder"): 123_060_480,
    ("sd2", "text_encoder"): 340_387_840,
    ("sdxl", "text_encoder_2"): 694_659_840,
}
"""Parameters of the released models."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_becomes_a_pipeline_and_the_same_file_again(family: str, narrow_bases: dict[str, NarrowBase]) -> None:
    narrow = narrow_bases[family]
    pipeline = load_single_file(narrow.file, configuration=narrow.configuration)
    for part in pipeline_parts(family):
        assert_same_weights(getattr(pipeline, part).state_dict(), getattr(narrow.pipeline, part).state_dict())
    written = to_original_layout(pipeline)
    read = load_file(narrow.file)
    assert_same_weights(written, {name: read[name] for name in read if name not in ("alphas_cumprod", "model_ema.decay")})


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_the_file_as_it_was_written(family: str, narrow_bases: dict[str, NarrowBase]) -> None:
    narrow = narrow_bases[family]
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    names = ["tokenizer", "tokenizer_2"] if family == "sdxl" else ["tokenizer"]
    tokenizers = {name: getattr(narrow.pipeline, name) for name in names}
    loaded = kind.from_single_file(str(narrow.file), config=str(narrow.configuration), local_files_only=True, **tokenizers)
    for part in pipeline_parts(family):
        assert_same_weights(getattr(loaded, part).state_dict(), getattr(narrow.pipeline, part).state_dict())


@pytest.mark.parametrize(("family", "part"), SIZES)
def test_the_shipped_configurations_are_those_of_the_released_models(family: str, part: str) -> None:
    folder = CONFIGURATIONS / family / part
    with init_empty_weights():
        if part == "unet":
            model = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
        elif part == "vae":
            model = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
        else:
            kind = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
            model = kind(CLIPTextConfig.from_pretrained(folder))
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[family, part]
    names = places(part, family, model.state_dict())
    assert len({(place.name, place.third) for place in names.values()}) == len(names)


@pytest.mark.parametrize(("part", "one", "other"), [("vae", "sd1", "sd2"), ("text_encoder", "sd1", "sdxl")])
def test_parts_that_families_share_have_one_configuration(part: str, one: str, other: str) -> None:
    first, second = ((CONFIGURATIONS / family / part / "config.json").read_text() for family in (one, other))
    assert first == second


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_read_exactly(dtype: torch.dtype, narrow_bases: dict[str, NarrowBase], tmp_path: Path) -> None:
    narrow = narrow_bases["sd1"]
    half = {name: tensor.to(dtype) for name, tensor in to_original_layout(narrow.pipeline).items()}
    save_file(half, tmp_path / "half.safetensors")
    read = read_base(tmp_path / "half.safetensors", configuration=narrow.configuration)
    assert_same_weights(to_original_layout(read.pipeline), half)
    loaded = load_base(tmp_path / "half.safetensors", device="cpu", configuration=narrow.configuration)
    assert_same_weights(to_original_layout(loaded.pipeline), {name: tensor.float() for name, tensor in half.items()})
    assert loaded.fingerprint == read.fingerprint


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_file_that_is_only_read_stays_on_the_disk(
    dtype: torch.dtype, narrow_bases: dict[str, NarrowBase], tmp_path: Path
) -> None:
    """The weights of the whole pipeline lie in the one mapping of the file, so memory for a second copy is never taken."""
    narrow = narrow_bases["sd1"]
    file = tmp_path / "a.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in to_original_layout(narrow.pipeline).items()}, file)
    pipeline = read_base(file, configuration=narrow.configuration).pipeline
    weights = [tensor for part in pipeline_parts("sd1") for tensor in getattr(pipeline, part).state_dict().values()]
    assert max(tensor.data_ptr() for tensor in weights) - min(tensor.data_ptr() for tensor in weights) < file.stat().st_size


@pytest.mark.parametrize("form", ["wrapped", "old", "renamed"])
def test_a_torch_file_of_weights_is_read(form: str, narrow_bases: dict[str, NarrowBase], tmp_path: Path) -> None:
    narrow, path = narrow_bases["sd1"], tmp_path / "model.ckpt"
    tensors = to_original_layout(narrow.pipeline)
    if form == "renamed":
        shutil.copy(narrow.file, path)
    else:
        content = {"state_dict": tensors, "global_step": 7} if form == "wrapped" else tensors
        torch.save(content, path, _use_new_zipfile_serialization=form != "old")
    assert_same_weights(to_original_layout(load_single_file(path, configuration=narrow.configuration)), tensors)


def test_text_encoder_names_without_their_prefix_are_read(narrow_bases: dict[str, NarrowBase], tmp_path: Path) -> None:
    narrow = narrow_bases["sd1"]
    tensors = to_original_layout(narrow.pipeline)
    save_original({name.replace(".text_model.", "."): tensor for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    pipeline = load_single_file(tmp_path / "a.safetensors", configuration=narrow.configuration)
    assert_same_weights(to_original_layout(pipeline), tensors)


TEXTS = (
    "a photo of a dog near a lake", "", "It's 1,024 Pixels -- isn't it?", "Ein schönes Hündchen 犬 🐶", "  two\n lines  ",
    "CamelCase_snake-case.v2", "xylophone zebra " * 50,
)  # fmt: skip


def test_the_tokenizer_is_clips() -> None:
    expected = open_clip.get_tokenizer("ViT-L-14")(list(TEXTS))
    for pad, number in (("!", 0), ("<|endoftext|>", 49407)):
        ids = clip_tokenizer(pad_token=pad)(list(TEXTS), padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert ids.shape == (len(TEXTS), 77)
        padded = (expected == 0) & (torch.arange(77) > expected.argmax(1, keepdim=True))
        assert torch.equal(ids, expected.masked_fill(padded, number))
    both = [
        tokenizer("what?!")["input_ids"]
        for tokenizer in (clip_tokenizer(pad_token="<|endoftext|>"), clip_tokenizer(pad_token="!"))
    ]
    assert both[0] == [49406, 768, 2835, 49407] and both[1] == [49406, 768, 286, 0, 49407]


@pytest.mark.parametrize(
    ("family", "extra", "metadata", "expected"),
    [
        ("sd1", (), {}, "epsilon"),
        ("sd1", (), {"modelspec.prediction_type": "v"}, "v_prediction"),
        ("sdxl", ("v_pred",), {}, "v_prediction"),
        ("sdxl", (), {"ss_v_parameterization": "True"}, "v_prediction"),
        ("sd2", (), {}, "epsilon"),
        ("sd2", ("spread",), {}, "v_prediction"),
        ("sd2", ("spread",), {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ("sd2", (), {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ("sd2", ("spread",), {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
    ],
)
def test_what_the_base_predicts_is_read_from_the_file(
    family: str, extra: tuple[str, ...], metadata: dict[str, str], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {name: torch.zeros(0) for name in extra if name != "spread"}
    bias = torch.linspace(-1, 1, 8) if "spread" in extra else torch.zeros(8)
    tensors[f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"] = bias
    assert prediction_type_of(Checkpoint(path=Path("x"), tensors=tensors, metadata=metadata), family) == expected
    assert ("does not say what it predicts" in caplog.text) == (family == "sd2" and not metadata)


def test_what_the_base_predicts_can_be_said(narrow_bases: dict[str, NarrowBase], tmp_path: Path) -> None:
    narrow = narrow_bases["sd2"]
    for source in (narrow.file, narrow.folder):
        base = load_base(source, device="cpu", prediction_type="v_prediction", configuration=narrow.configuration)
        assert base.pipeline.scheduler.config.prediction_type == "v_prediction"
        assert base.pipeline.scheduler.config.clip_sample is False
    with pytest.raises(BaseError, match="no prediction type 'noise'; choose one of epsilon, v_prediction"):
        load_base(narrow.file, prediction_type="noise")
