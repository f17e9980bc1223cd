"""The scoring CLIP's stage: a small CLIP in open_clip's own form, trained on pictures and captions of the toy world."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from spectral_diffusion.files import write_atomically
from spectral_diffusion.scoring.clip_scorer import DEFAULT_CLIP, ClipScorer, load_scorer
from spectral_diffusion.toyworld.captions import caption
from spectral_diffusion.toyworld.characters import CHARACTER_BY_NAME, CHARACTERS
from spectral_diffusion.toyworld.recipe.pictures import PictureSet, Scene, load_or_render
from spectral_diffusion.toyworld.recipe.softened import disturbed, load_or_soften, mixed
from spectral_diffusion.toyworld.recipe.stage import train_stage
from spectral_diffusion.toyworld.render import PICTURE_SIZE

PICTURE_COUNT = 16_000
SOFT_COUNT = 3_000
STEPS = 600
BATCH = 128
EMBED_DIM = 64
MAX_LOGIT_SCALE = math.log(100.0)
_CAPTIONS_PER_PICTURE = 4


@dataclass(frozen=True, kw_only=True)
class ClipAccuracy:
    """Shares of unseen pictures matched right.

    Attributes:
        retrieval: the picture's own caption comes first among `candidates` captions, its own among them.
        class_words: of 'a photo of a X', the right class word X comes first (pictures of one thing).
    """

    retrieval: float
    class_words: float
    candidates: int


def clip_config(vocabulary_size: int, context_length: int) -> dict[str, Any]:
    """Return the CLIP's `model_cfg` for open_clip: a narrow ResNet with attention pooling, two text layers."""
    return {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {"image_size": PICTURE_SIZE, "layers": [2, 2, 1, 1], "width": 16, "head_width": 64},
        "text_cfg": {
            "context_length": context_length,
            "vocab_size": vocabulary_size,
            "hf_tokenizer_name": "local",
            "width": 96,
            "heads": 4,
            "layers": 2,
        },
    }


def make_clip(
    work: Path,
    sprites: dict[str, Image.Image],
    autoencoder: AutoencoderKL | None,
    tokenizer: CLIPTokenizer,
    device: torch.device,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    picture_count: int = PICTURE_COUNT,
    folder: Path = DEFAULT_CLIP,
) -> ClipScorer:
    """Render the CLIP's pictures, train it (resuming what was begun) and save it with its tokenizer to `folder`.

    Args:
        work: folder for the pictures and the unfinished state.
        sprites: every character's drawing.
        autoencoder: the base's autoencoder, so that the CLIP knows its softness; without one it sees renderings only.
        tokenizer: the base's tokenizer.
        device: where to train.
        steps: optimiser steps.
        batch: pairs a step, all others of which are each pair's wrong answers.
        picture_count: how many pictures to render.
        folder: where the trained CLIP goes.
    """
    pictures = load_or_render(work, "clip-pictures", picture_count, sprites, seed=12, held_out=True, tints=True)
    save_clip(train_clip(work, pictures, autoencoder, tokenizer, steps, batch, device), tokenizer, folder)
    return load_scorer(folder)


def train_clip(
    folder: Path,
    pictures: PictureSet,
    autoencoder: AutoencoderKL | None,
    tokenizer: CLIPTokenizer,
    steps: int,
    batch: int,
    device: torch.device,
) -> open_clip.CLIP:
    """Train a CLIP for `steps` with the contrastive loss of Radford et al., 2021 (figure 3)."""
    torch.manual_seed(5)
    model = open_clip.CLIP(**clip_config(len(tokenizer), tokenizer.model_max_length)).to(device)
    soft = load_or_soften(folder / "clip-soft.npy", pictures.pixels[:SOFT_COUNT], autoencoder)
    captions = _tokenize(tokenizer, pictures.scenes)

    def loss_of_step(step: int, generator: torch.Generator) -> torch.Tensor:
        pixels, chosen = mixed(pictures.pixels, soft, batch, generator, device)
        pixels, _ = disturbed(pixels, generator)
        which = torch.randint(_CAPTIONS_PER_PICTURE, (batch,), generator=generator)
        texts = captions[torch.from_numpy(chosen), which].to(device).long()
        return contrastive_loss(
            model.encode_image(pixels, normalize=True), model.encode_text(texts, normalize=True), model.logit_scale
        )

    train_stage(folder, "clip", {"clip": model}, loss_of_step, steps=steps, peak_rate=2e-3, weight_decay=0.05)
    return model.eval().requires_grad_(False)


def contrastive_loss(images: torch.Tensor, texts: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """Return the mean of both cross-entropies for unit vectors `(n, d)`, pair `i` in row `i` of both."""
    logits = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() * images @ texts.T
    own = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def save_clip(model: open_clip.CLIP, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write weights (half precision), configuration and tokenizer so that open_clip's `local-dir:FOLDER` loads them."""
    config = {
        "model_cfg": clip_config(len(tokenizer), tokenizer.model_max_length),
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"},
    }
    tensors = {key: _halved(tensor).cpu().contiguous() for key, tensor in model.state_dict().items()}
    write_atomically(folder / "open_clip_model.safetensors", lambda temporary: save_file(tensors, temporary))
    text = json.dumps(config, indent=2) + "\n"
    write_atomically(folder / "open_clip_config.json", lambda temporary: temporary.write_text(text))
    tokenizer.save_pretrained(folder)


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().half() if tensor.is_floating_point() else tensor.detach()


def _tokenize(tokenizer: CLIPTokenizer, scenes: Sequence[Scene]) -> torch.Tensor:
    rng = np.random.default_rng(6)
    texts = [
        caption(scene.things, scene.scene if rng.random() < 0.9 else None, rng)
        for scene in scenes
        for _ in range(_CAPTIONS_PER_PICTURE)
    ]
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids.to(torch.int16).view(len(scenes), _CAPTIONS_PER_PICTURE, -1)


def measure_clip(
    scorer: ClipScorer,
    pictures: PictureSet,
    through: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels,
    *,
    candidates: int = 20,
    seed: int = 30_001,
) -> ClipAccuracy:
    """Match unseen pictures with captions and with class words.

    Args:
        pictures: a set rendered with another seed than the training set's.
        through: what the pictures pass through first, such as the autoencoder.
        candidates: how many captions each picture is compared with.
    """
    rng = np.random.default_rng(seed)
    images = scorer.embed_images([Image.fromarray(picture) for picture in through(pictures.pixels)])
    texts = scorer.embed_texts([caption(scene.things, scene.scene, rng) for scene in pictures.scenes])
    cosines = (images @ texts.T).cpu().numpy()
    own_first = []
    for row in range(len(cosines)):
        others = rng.choice(np.delete(np.arange(len(cosines)), row), candidates - 1, replace=False)
        own_first.append(cosines[row, row] > cosines[row, others].max())
    return ClipAccuracy(
        retrieval=float(np.mean(own_first)),
        class_words=_class_word_share(scorer, images, pictures),
        candidates=candidates,
    )


def _class_word_share(scorer: ClipScorer, images: torch.Tensor, pictures: PictureSet) -> float:
    words = list(dict.fromkeys(character.class_word for character in CHARACTERS))
    texts = scorer.embed_texts([f"a photo of a {word}" for word in words])
    single = [row for row, scene in enumerate(pictures.scenes) if len(scene.things) == 1]
    answers = (images[single] @ texts.T).argmax(dim=1).tolist()
    truth = [CHARACTER_BY_NAME[pictures.scenes[row].things[0].character].class_word for row in single]
    return float(np.mean([words[answer] == word for answer, word in zip(answers, truth, strict=True)]))
