"""The fit of an adapter's bands: zero on their own base, told per group on others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from narrow_bases import NarrowBase, save_narrow_base
from random_adapters import random_adapter
from shared_bases import shared_base

from spectral_diffusion.adapters.adapter_file import save_adapter
from spectral_diffusion.adapters.attach import attached
from spectral_diffusion.adapters.fit import GROUPS, band_misfit, layer_group, misfit_in_words
from spectral_diffusion.bases.base import Base, adaptable_layers, load_base
from spectral_diffusion.cli import main
from spectral_diffusion.errors import AdapterError


@pytest.fixture
def own(loaded_bases: dict[str, Base]) -> Base:
    return loaded_bases["sd1"]


@pytest.mark.parametrize(
    ("key", "group"),
    [
        ("text_encoder_2.encoder.layers.0.self_attn.q_proj", "text encoder"),
        ("unet.conv_in", "UNet down"),
        ("unet.time_embedding.linear_1", "UNet down"),
        ("unet.down_blocks.0.downsamplers.0.conv", "UNet down"),
        ("unet.mid_block.resnets.0.conv1", "UNet mid"),
        ("unet.up_blocks.3.attentions.2.proj_out", "UNet up"),
        ("unet.conv_out", "UNet up"),
    ],
)
def test_every_layer_belongs_to_the_part_that_holds_it(key: str, group: str) -> None:
    assert layer_group(key) == group


def test_bands_fit_the_base_that_they_were_taken_from(own: Base) -> None:
    misfit = band_misfit(own, random_adapter(own, start=2))
    assert tuple(misfit) == GROUPS
    assert max(misfit.values()) < 1e-5  # float32 round-off


def test_the_misfit_is_told_for_the_group_whose_weights_differ(narrow_bases: dict[str, NarrowBase]) -> None:
    own = load_base(narrow_bases["sd1"].folder, device="cpu")
    adapter = random_adapter(own, rank=4)
    for key, layer in adaptable_layers(own).items():
        if layer_group(key) == "UNet mid":
            layer.weight.data *= 1.25
    misfit = band_misfit(own, adapter)
    assert misfit.pop("UNet mid") == pytest.approx(0.25, rel=1e-4)
    assert max(misfit.values()) < 1e-5
    assert misfit_in_words({"UNet mid": 0.25, "UNet up": 0.0012}) == "UNet mid 25 %, UNet up 0.12 %"


def test_an_adapter_works_on_another_base_of_the_family(own: Base, tmp_path: Path) -> None:
    adapter = random_adapter(own)
    other = load_base(save_narrow_base("sd1", tmp_path, seed=1).folder, device="cpu")
    assert other.fingerprint != own.fingerprint
    assert all(0.9 < value < 1.2 for value in band_misfit(other, adapter).values())  # random weights have nothing in common
    with attached(other, adapter), torch.no_grad():
        assert other.pipeline.text_encoder(torch.tensor([[49406, 320, 49407]])).last_hidden_state.isfinite().all()


def test_another_family_is_refused(own: Base, tiny_base_folder: Path) -> None:
    adapter = random_adapter(own)
    with pytest.raises(AdapterError, match=r"belongs to a base of family 'sd1', .* is of family 'mini'"):
        band_misfit(shared_base("tiny", tiny_base_folder), adapter)


def test_the_commands_tell_it(
    own: Base, narrow_bases: dict[str, NarrowBase], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, base = tmp_path / "a.safetensors", ("--base", str(narrow_bases["sd1"].folder))
    adapter = random_adapter(own)
    other = load_base(save_narrow_base("sd1", tmp_path / "other", seed=1).folder, device="cpu")
    save_adapter(random_adapter(other), file)
    assert main(["info", str(file), *base]) == 0
    assert "though it was trained on another base of the family\n  bands off   text encoder " in capsys.readouterr().out
    draw = ("generate", "--adapter", str(file), "--prompt", "a <V1>", "--steps", "1", "--out", str(tmp_path / "pictures"), *base)
    draw = (*draw, "--device", "cpu")
    assert main([*draw, "--prediction-type", "v_prediction"]) == 0
    assert "trained on another base of the family; its bands are off by text encoder" in capsys.readouterr().err
    save_adapter(adapter, file)
    assert main([*draw]) == 0
    assert "bands are off" not in capsys.readouterr().err
