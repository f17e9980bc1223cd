"""The judge's stage: trained on all characters, the held-out ones too, and measured on pictures it never saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

from spectral_diffusion.toyworld.characters import CHARACTERS
from spectral_diffusion.toyworld.judge import DEFAULT_JUDGE, GRID, Judge, JudgeNetwork, load_judge, save_judge
from spectral_diffusion.toyworld.recipe.pictures import PictureSet, load_or_render
from spectral_diffusion.toyworld.recipe.softened import autoencode, disturbed, load_or_soften, mixed
from spectral_diffusion.toyworld.recipe.stage import train_stage
from spectral_diffusion.toyworld.render import Thing, render
from spectral_diffusion.toyworld.scenes import SCENES

PICTURE_COUNT = 16_000
SOFT_COUNT = 4_000
STEPS = 1800
BATCH = 32
_MOST_THINGS = 3
_PEAK_WIDTH = 0.05
_NAME_WIDTH = 0.10


@dataclass(frozen=True, kw_only=True)
class JudgeAccuracy:
    """Shares of unseen pictures judged right: one character at first sight, or both of two as a set."""

    singles: float
    pairs: float
    soft_singles: float | None
    soft_pairs: float | None
    count: int


def make_judge(
    work: Path,
    sprites: dict[str, Image.Image],
    autoencoder: AutoencoderKL | None,
    device: torch.device,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    picture_count: int = PICTURE_COUNT,
    path: Path = DEFAULT_JUDGE,
) -> Judge:
    """Render the judge's pictures, train it (resuming what was begun) and save it to `path`.

    Args:
        work: folder for the pictures and the unfinished state.
        sprites: every character's drawing.
        autoencoder: the base's autoencoder, so that the judge knows its softness; without one it sees renderings only.
        device: where to train.
        steps: optimiser steps.
        batch: pictures a step.
        picture_count: how many pictures to render.
        path: where the trained judge goes.
    """
    pictures = load_or_render(work, "judge-pictures", picture_count, sprites, seed=11, held_out=True, tints=False)
    save_judge(train_judge(work, pictures, autoencoder, steps, batch, device), [c.name for c in CHARACTERS], path)
    return load_judge(path)


def train_judge(
    folder: Path, pictures: PictureSet, autoencoder: AutoencoderKL | None, steps: int, batch: int, device: torch.device
) -> JudgeNetwork:
    """Train the judge's network for `steps` on plain and autoencoded pictures, half of each batch from either."""
    torch.manual_seed(4)
    network = JudgeNetwork(len(CHARACTERS)).to(device, memory_format=torch.channels_last)
    soft = load_or_soften(folder / "judge-soft.npy", pictures.pixels[:SOFT_COUNT], autoencoder)
    centres, names = _targets(pictures)

    def loss_of_step(step: int, generator: torch.Generator) -> torch.Tensor:
        pixels, chosen = mixed(pictures.pixels, soft, batch, generator, device)
        pixels, moves = disturbed(pixels, generator)
        shown = torch.from_numpy(centres[chosen]).to(device)
        moved = (shown - 0.5 - moves[:, None, 1:]) / moves[:, None, :1] + 0.5
        return judge_loss(network(pixels), moved, torch.from_numpy(names[chosen]).to(device))

    train_stage(folder, "judge", {"judge": network}, loss_of_step, steps=steps, peak_rate=2e-3, ema_decay=0.995)
    return network.eval()


def judge_loss(logits: torch.Tensor, centres: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the centres' heat map plus cross-entropy of the names around each centre.

    Args:
        logits: `(n, 1 + characters, 16, 16)`, see `JudgeNetwork`.
        centres: `(n, things, 2)` x and y in fractions of the side, not a number where there is no thing.
        names: `(n, things)` indices of the characters.

    The heat map and its weighting follow CenterNet (Zhou et al., 2019, equation 1), with one map for all classes.
    """
    axis = (torch.arange(GRID, device=logits.device) + 0.5) / GRID
    x, y = centres[..., 0, None, None], centres[..., 1, None, None]
    squares = (axis[None, None, None, :] - x) ** 2 + (axis[None, None, :, None] - y) ** 2
    nearest, owner = squares.nan_to_num(4.0).min(dim=1)
    heat = torch.exp(-nearest / (2 * _PEAK_WIDTH**2))
    chance = logits[:, 0].sigmoid()
    error = F.binary_cross_entropy_with_logits(logits[:, 0], heat, reduction="none")
    centre_loss = ((chance - heat).abs() ** 2 * error).sum() / len(logits)
    weight = torch.exp(-nearest / (2 * _NAME_WIDTH**2))
    weight = weight * (weight > 0.1)
    right = torch.gather(names, 1, owner.flatten(1)).view(owner.shape)
    name_error = F.cross_entropy(logits[:, 1:], right, reduction="none")
    return centre_loss + (weight * name_error).sum() / weight.sum().clamp(min=1.0)


def _targets(pictures: PictureSet) -> tuple[np.ndarray, np.ndarray]:
    index = {character.name: position for position, character in enumerate(CHARACTERS)}
    centres = np.full((len(pictures.scenes), _MOST_THINGS, 2), np.nan, dtype=np.float32)
    names = np.zeros((len(pictures.scenes), _MOST_THINGS), dtype=np.int64)
    for row, scene in enumerate(pictures.scenes):
        for column, (thing, box) in enumerate(zip(scene.things, scene.boxes, strict=True)):
            centres[row, column] = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            names[row, column] = index[thing.character]
    return centres, names


def measure_judge(
    judge: Judge,
    sprites: dict[str, Image.Image],
    autoencoder: AutoencoderKL | None = None,
    *,
    count: int = 480,
    seed: int = 20_001,
) -> JudgeAccuracy:
    """Judge `count` fresh renderings of one character and `count` of two, and the same after the autoencoder.

    Args:
        sprites: every character's drawing.
        autoencoder: the base's, or None to leave its two figures out.
        count: pictures of each kind; every character comes equally often when it is a multiple of their number.
        seed: must differ from those of the training sets.
    """
    singles, single_names = fresh_renderings(sprites, 1, count, seed)
    pairs, pair_names = fresh_renderings(sprites, 2, count, seed + 1)

    def shares(through: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        return _share_right(judge, through(singles), single_names), _share_right(judge, through(pairs), pair_names)

    plain = shares(lambda pixels: pixels)
    soft = shares(lambda pixels: autoencode(autoencoder, pixels)) if autoencoder is not None else (None, None)
    return JudgeAccuracy(singles=plain[0], pairs=plain[1], soft_singles=soft[0], soft_pairs=soft[1], count=count)


def fresh_renderings(
    sprites: dict[str, Image.Image], things: int, count: int, seed: int
) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Return `(count, 64, 64, 3)` uint8 pictures of `things` different characters each, and the characters' names."""
    rng = np.random.default_rng(seed)
    pixels, names, scenes = [], [], list(SCENES)
    for index in range(count):
        first = index % len(CHARACTERS)
        others = rng.choice([i for i in range(len(CHARACTERS)) if i != first], things - 1, replace=False)
        chosen = tuple(CHARACTERS[position].name for position in rng.permutation([first, *others]).astype(int))
        scene = scenes[rng.integers(len(scenes))]
        shown = tuple(Thing(character=name) for name in chosen)
        pixels.append(np.asarray(render(sprites, shown, scene, rng).picture))
        names.append(chosen)
    return np.stack(pixels), names


def _share_right(judge: Judge, pixels: np.ndarray, names: list[tuple[str, ...]]) -> float:
    seen = judge.look([Image.fromarray(picture) for picture in pixels], limit=len(names[0]))
    right = [{s.character for s in sightings} == set(truth) for sightings, truth in zip(seen, names, strict=True)]
    return float(np.mean(right))
