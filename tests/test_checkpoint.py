"""Checkpoints: every weight comes in and goes out again, and what is no base is refused with a sentence."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from narrow_bases import FAMILIES, NarrowBase, change_json, save_original
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from spectral_diffusion.base import load_base, read_base
from spectral_diffusion.checkpoint import hub_folder, load_folder, load_single_file, to_original_layout
from spectral_diffusion.checkpoint.checkpoint_file import Checkpoint
from spectral_diffusion.checkpoint.clip_tokenizer import clip_tokenizer
from spectral_diffusion.checkpoint.original_layout import pipeline_parts, places
from spectral_diffusion.checkpoint.recognition import prediction_type_of
from spectral_diffusion.checkpoint.single_file import CONFIGURATIONS
from spectral_diffusion.errors import BaseError

Tensors = dict[str, torch.Tensor]
UNET = "model.diffusion_model."
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


class Trap:
    """Pickled, it creates the file `path` when it is unpickled by a general reader."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT | os.O_WRONLY)


def assert_same_weights(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


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


def small(*names: str, channels: int = 4) -> Tensors:
    """Return tensors called `names`, with the first convolution of a UNet that reads `channels` channels."""
    first = {f"{UNET}input_blocks.0.0.weight": torch.zeros(2, channels, 3, 3)}
    return (first if channels else {}) | {name: torch.zeros(2, 2) for name in names}


VAE, CLIP = "first_stage_model.encoder.conv_in.weight", "cond_stage_model.transformer.text_model.final_layer_norm.weight"


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (small("0/layers/unet.mid_block.x.to_q/A", channels=0), "is an adapter of this program; give it where adapters go"),
        (small("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", channels=0), "is a LoRA"),
        (small("unet.mid_block.attentions.0.proj_in.lora_A.weight", channels=0), "is a LoRA"),
        (small("emb_params", channels=0), "is a token embedding"),
        (small("clip_l", "clip_g", channels=0), "is a token embedding"),
        (small("encoder.conv_in.weight", "decoder.conv_in.weight", channels=0), r"is an autoencoder \(VAE\) alone; give a whole"),
        (small(VAE, channels=0), r"is an autoencoder \(VAE\) alone"),
        (small("down_blocks.0.resnets.0.conv1.weight", channels=0), "is a UNet alone"),
        (small("input_blocks.0.0.weight", channels=0), "is a UNet alone"),
        (small("text_model.final_layer_norm.weight", channels=0), "is a text encoder alone"),
        (small("control_model.input_blocks.0.0.weight", VAE, CLIP), "is a ControlNet"),
        (small(f"{UNET}joint_blocks.0.x_block.mlp.fc1.weight", channels=0), "is a Stable Diffusion 3 checkpoint"),
        (small("double_blocks.0.img_attn.qkv.weight", channels=0), "is a Flux checkpoint"),
        (small("conditioner.embedders.0.model.ln_final.weight", VAE), "is the SDXL refiner; give the SDXL base"),
        (
            small("edm_mean", VAE, "conditioner.embedders.1.model.ln_final.weight"),
            "is an SDXL checkpoint for another noise schedule",
        ),
        (small(VAE, CLIP, channels=9), "is an inpainting checkpoint; give a plain text-to-image one"),
        (small(VAE, CLIP, channels=8), "is an instruct-pix2pix checkpoint"),
        (small(VAE, CLIP, channels=5), "is a depth-to-image checkpoint"),
        (small(VAE, CLIP, channels=6), "is a checkpoint whose UNet reads 6 channels"),
        (small(CLIP), r"lacks its autoencoder \(VAE\)"),
        (small(VAE), "lacks its text encoder"),
        (small(VAE, CLIP), r"has no tensor .*, which every Stable Diffusion 1 has; it is incomplete"),
        (small("weights", channels=0), "is no checkpoint known here"),
    ],
)
def test_what_is_no_base_is_said(tensors: Tensors, sentence: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "ein schönes Modell 犬.safetensors")
    with pytest.raises(BaseError, match=rf"犬\.safetensors' {sentence}"):
        load_base(tmp_path / "ein schönes Modell 犬.safetensors")


def damaged_in_half(number: float) -> Callable[[Tensors], None]:
    """Put one `number` into a weight in half precision."""

    def change(tensors: Tensors) -> None:
        weight = tensors[f"{UNET}out.2.weight"].half()
        weight.view(-1)[-1] = number
        tensors[f"{UNET}out.2.weight"] = weight

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda tensors: tensors.pop("first_stage_model.decoder.up.0.block.1.conv2.bias"),
            r"has no tensor .*up\.0\.block\.1\.conv2",
        ),
        (lambda tensors: tensors[f"{UNET}out.2.weight"].fill_(torch.nan), r"holds NaN or infinite numbers in 'unet\.conv_out"),
        (damaged_in_half(torch.nan), r"holds NaN or infinite numbers in 'unet\.conv_out\.weight'"),
        (damaged_in_half(-torch.inf), r"holds NaN or infinite numbers in 'unet\.conv_out\.weight'"),
        (
            lambda tensors: tensors.update({f"{UNET}out.2.bias": torch.zeros(5)}),
            r"'unet\.conv_out\.bias' is \(5,\), expected \(4,\)",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    change: Callable[[Tensors], object], sentence: str, narrow_bases: dict[str, NarrowBase], tmp_path: Path
) -> None:
    narrow = narrow_bases["sd1"]
    tensors = {name: tensor.clone() for name, tensor in to_original_layout(narrow.pipeline).items()}
    change(tensors)
    save_original(tensors, tmp_path / "a.safetensors")
    with pytest.raises(BaseError, match=sentence):
        load_single_file(tmp_path / "a.safetensors", configuration=narrow.configuration)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1], ids=["empty", "length", "header", "all but a byte"])
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_a_truncated_file_is_refused(name: str, kept: int, narrow_bases: dict[str, NarrowBase], tmp_path: Path) -> None:
    if name.endswith(".ckpt"):
        torch.save({"weight": torch.ones(100)}, tmp_path / "whole")
    else:
        save_file({"weight": torch.ones(1000)}, tmp_path / "whole")
    (tmp_path / name).write_bytes((tmp_path / "whole").read_bytes()[:kept])
    with pytest.raises(BaseError, match=r"is no checkpoint: .*Fetch it again|is damaged"):
        load_base(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"<html>not found</html>", b"\x89PNG\r\n\x1a\n" + bytes(50), b"version https://git-lfs.github.com"]
)
def test_another_kind_of_file_under_the_name_of_a_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(BaseError, match=r"a\.safetensors' is no checkpoint: .* another kind of file under this name"):
        load_base(tmp_path / "a.safetensors")


def test_a_header_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(BaseError, match="is damaged or was not copied whole"):
        load_base(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_code_in_a_pickle_never_runs(form: str, name: str, tmp_path: Path) -> None:
    path, created = tmp_path / name, tmp_path / "created"
    content = {"state_dict": small(VAE, CLIP), "trap": Trap(created)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(BaseError, match=r"holds more than weights, which is never run .*; get the checkpoint as a \.safetensors"):
        load_base(path)
    assert not created.exists()
    os.close(pickle.loads(pickle.dumps(Trap(created))))
    assert created.exists()  # so the trap does work


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
