"""What is no base, or a damaged one, is refused with a sentence, and code in a file never runs."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import UNET, Tensors, Trap
from narrow_bases import NarrowBase, save_original
from safetensors.torch import save_file

from spectral_diffusion.bases.base import load_base
from spectral_diffusion.bases.checkpoint import load_single_file, to_original_layout
from spectral_diffusion.errors import BaseError


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
