"""Small models and photos that the tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # small models, and other programs may keep processors busy; read when torch is imported

import numpy as np
import pytest
import torch
from commands import Commands
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from narrow_bases import FAMILIES, NarrowBase, save_narrow_base
from PIL import Image, ImageDraw
from shared_bases import shared_base
from short_trainings import follow_gradients, prepare_less
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from spectral_diffusion.bases.base import EMBEDDED_BASE, Base, load_base
from spectral_diffusion.cli import main
from spectral_diffusion.concepts.concept import Concept, load_concept

if TYPE_CHECKING:
    from app.actions.studio import Studio


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the tests' cache apart from the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["SPECTRAL_DIFFUSION_CACHE"] = str(folder)
    yield folder
    del os.environ["SPECTRAL_DIFFUSION_CACHE"]


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny random Stable Diffusion that draws 32-pixel pictures and predicts noise."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_BASE / "tokenizer")
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=48,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("tiny-base")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_base(tiny_base_folder: Path) -> Base:
    """The tiny random Stable Diffusion, freshly loaded."""
    return load_base(tiny_base_folder, device="cpu")


@pytest.fixture(scope="session")
def base(tiny_base_folder: Path) -> Base:
    """The tiny random Stable Diffusion; leave it as it is."""
    return shared_base("tiny", tiny_base_folder)


@pytest.fixture(scope="session")
def narrow_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NarrowBase]:
    """Random bases with the structure of SD1.5, SD2.1 and SDXL, saved as a folder and as one file; leave them as they are."""
    return {family: save_narrow_base(family, tmp_path_factory.mktemp(f"narrow-{family}")) for family in FAMILIES}


@pytest.fixture(scope="session")
def loaded_bases(narrow_bases: dict[str, NarrowBase]) -> dict[str, Base]:
    """The narrow bases, loaded from one file each; leave them as they are."""
    return {
        family: load_base(narrow.file, device="cpu", configuration=narrow.configuration)
        for family, narrow in narrow_bases.items()
    }


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photos that differ, with captions."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(5)
    for number in range(5):
        picture = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((96, 80), Image.Resampling.BICUBIC)
        ImageDraw.Draw(picture).ellipse([20 + 4 * number, 20, 60, 60], fill=(200, 40 * number, 30))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("<TOK> near a lake", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def concept(photo_folder: Path) -> Concept:
    """The photos of `photo_folder` as `<V1>`, a dog."""
    return load_concept(photo_folder, token="<V1>", class_word="dog")


@pytest.fixture(scope="module")
def less_preparation() -> Iterator[None]:
    """Let a module's trainings prepare little."""
    with pytest.MonkeyPatch.context() as patch:
        prepare_less(patch)
        yield


@pytest.fixture(scope="module")
def followed_gradients() -> Iterator[None]:
    """Let a module's trainings be compared number by number, whatever the processor rounds."""
    with pytest.MonkeyPatch.context() as patch:
        follow_gradients(patch)
        yield


@pytest.fixture
def run(tiny_base_folder: Path, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(tiny_base_folder, capsys)


@pytest.fixture(scope="session")
def trained(tiny_base_folder: Path, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters on bands of their own; leave them as they are."""
    folder = tmp_path_factory.mktemp("trained")
    files = folder / "one.safetensors", folder / "two.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        prepare_less(patch)
        for token, file in zip(("<V1>", "<V2>"), files, strict=True):
            words = ["train", photo_folder, "--token", token, "--class-word", "dog", "--out", file, "--avoid", folder]
            words += ["--base", tiny_base_folder, "--device", "cpu", "--steps", 2, "--batch", 1, "--rank", 2]
            assert main([str(word) for word in [*words, "--no-weakest-first"]]) == 0
    return files


@pytest.fixture
def adapters(trained: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the trained adapters that a test may do anything with."""
    return tuple(Path(shutil.copy(file, tmp_path)) for file in trained)


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    from app.actions.studio import open_studio

    return open_studio(tmp_path / "studio")


@pytest.fixture
def tiny_studio(studio: Studio, tiny_base_folder: Path) -> Studio:
    studio.change_settings(base=str(tiny_base_folder), device="cpu")
    return studio
