"""What can be chosen about a training, and the presets that choose it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from spectral_diffusion.bases.layer_names import ATTENTION_LAYERS, CONVOLUTION_LAYERS, FEED_FORWARD_LAYERS
from spectral_diffusion.errors import InputError
from spectral_diffusion.parametrisations import PARAMETRISATIONS, TUNERS

if TYPE_CHECKING:
    from spectral_diffusion.bases.base import Base

SEED_STRIDE = 1_000_003
"""Step number `n` of seed `s` draws with the seed `s * SEED_STRIDE + n`."""
LARGEST_SEED = 2**63 // SEED_STRIDE - 1
"""The largest seed whose steps draw with seeds that torch takes."""
SETTLING_STEPS = 600
"""Steps of a settling, see `settle`."""
PRESETS = ("fast", "balanced", "best")
NOT_ADAPTED = "text_projection"
"""The one linear layer of SDXL's second text encoder that no other tool reads a change of."""


def _setting(default: object, help: str) -> object:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of one training; each field's help is the text that the command line and the studio show.

    Rates, rank, layers, steps, batch and weight decay are by default those of the paper's code (Zhang & Pilanci 2024). Its rates
    moved the unit vectors themselves; here they move the balanced band (see `parametrisations.additive`). Inertness, presence and
    isolation, which let sums keep identity, are not in it. What it has beside: two vectors for the token in every cross-attention
    layer, which stop at a mean norm of 0.55, attention regularisation of 0.01 (`token_vectors`, `layerwise_token`, `token_norm`,
    `attention`), and noise offset by 0.01, which there is not here.

    Raises:
        InputError: a value is out of range; the message names the field.
    """

    parametrisation: str = _setting(
        "additive", "how a layer's change is written: additive or rotational; the others are rivals, for comparison"
    )
    rank: int = _setting(8, "singular directions per concept and layer")
    steps: int = _setting(1250, "optimiser steps")
    batch: int = _setting(2, "photos per step")
    inert_batch: int = _setting(2, "inertness samples per step, beside the photos")
    unet_rate: float = _setting(1e-4, "learning rate of the UNet's layers")
    text_encoder_rate: float = _setting(1e-5, "learning rate of the text encoder's layers")
    token_rate: float = _setting(1e-3, "learning rate of the token embedding")
    token_distance: float = _setting(
        0.0,
        "how far from its class word the token begins, in norms of that word and in a direction of its own: the farther, and the "
        "lower its rate, the less it is taken for another concept's",
    )
    token_vectors: int = _setting(1, "vectors that the token stands for; the last begins at the class word, the others at random")
    layerwise_token: bool = _setting(
        False, "let the token have vectors of its own for every cross-attention layer; other tools can hold their mean only"
    )
    token_norm: float = _setting(0.0, "the token stays as it is once its vectors' mean norm reaches this; 0: it never does")
    caption_dropout: float = _setting(0.0, "share of the crops that are called by the token alone, whatever their caption says")
    weight_decay: float = _setting(0.01, "AdamW's weight decay of the layers")
    gradient_norm: float = _setting(1.0, "gradients are clipped to this norm")
    inertness: float = _setting(1.0, "weight of the loss that keeps prompts without the token as the base draws them")
    presence: float = _setting(
        0.67, "share of the steps made among the concepts to be drawn with: some or all are attached, as in the fused adapter"
    )
    scenes: float = _setting(
        0.0,
        "share of the photos that, cut out along their masks, stand beside one or two other things in a scene that the base "
        "draws: what was learnt large and by itself only falls apart where a prompt names several things",
    )
    mixing: float = _setting(
        0.0,
        "share of the photos in steps among the others that stand beside one or two of them, of concepts trained in one go",
    )
    weakest_first: bool = _setting(
        False,
        "give bands out from the weakest directions on, of those that every adapted layer has and the 256 strongest at most: the "
        "weaker, the freer a concept chooses what it reads and writes",
    )
    isolation: int = _setting(
        8,
        "number of bands, in the order they are given out; the concept neither writes into nor reads from the others' among them",
    )
    attention: float = _setting(
        0.0, "weight of the token's attention outside the mask, where a photo has one; 0: it may look anywhere"
    )
    background: float = _setting(0.1, "weight of the loss outside the mask, where a photo has one")
    seed: int = _setting(0, "seed of everything random in the training")
    checkpoint_every: int = _setting(50, "steps between checkpoints")
    sample_every: int = _setting(0, "steps between sample pictures; 0 draws none")
    layers: tuple[str, ...] = _setting(ATTENTION_LAYERS, "endings of the layers that are adapted, linear ones or convolutions")

    def __post_init__(self) -> None:
        if self.parametrisation not in PARAMETRISATIONS:
            raise InputError(f"parametrisation '{self.parametrisation}' is unknown; choose one of {', '.join(PARAMETRISATIONS)}.")
        for name, least in (
            ("rank", 1),
            ("steps", 1),
            ("batch", 1),
            ("inert_batch", 1),
            ("token_vectors", 1),
            ("checkpoint_every", 1),
        ):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        for name in (
            "unet_rate",
            "text_encoder_rate",
            "token_rate",
            "token_distance",
            "token_norm",
            "weight_decay",
            "inertness",
            "isolation",
            "attention",
            "background",
            "sample_every",
        ):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("caption_dropout", "scenes", "mixing"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be from 0 to 1, got {getattr(self, name)}.")
        if not 0 <= self.presence < 1:
            raise InputError(f"presence must be at least 0 and below 1, got {self.presence}; at 1 none learns to stand alone.")
        if not self.gradient_norm > 0:
            raise InputError(f"gradient_norm must be above 0, got {self.gradient_norm}; at 0 nothing is learnt.")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise InputError(f"seed must be from 0 to {LARGEST_SEED}, got {self.seed}.")
        for own in fields(self):
            value = getattr(self, own.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{own.name} must be a finite number, got {value}.")
        if NOT_ADAPTED in self.layers:
            raise InputError(f"layers names {NOT_ADAPTED}, whose change no other tool reads; choose others.")

    def seed_of(self, token: str) -> int:
        """Return the seed of what is random where the concept called `token` begins: another for every concept."""
        return self.seed + zlib.crc32(token.encode())


_PAPER = TrainingSettings()
_FOR_REAL_BASES = {
    "fast": replace(_PAPER, steps=400),
    "balanced": replace(_PAPER, steps=800),
    "best": _PAPER,
}
# The embedded base has attention at two coarse levels only. What its attention layers and those between them can change is the
# content of a picture, not its outlines; without the convolutions a concept's legs and head are smears (mean loss of a LoRA of
# rank 8 on one concept's photos: 0.172 without, 0.116 with, 0.109 with every weight trained). They are many, so a rank of 4 does:
# eight bands in a layer of 32 channels. Of its 16 x 16 latents most lie at an outline, which is learnt from both sides; and what
# was only shown large is not known at the size that two or three have beside each other. Its weakest directions leave a concept
# the freest choice of what it reads and writes, and want a higher rate. Tokens that begin at their class words and move as they
# like all go the same way, so that each concept answers to the others' tokens; those that begin apart and move little stay apart,
# as the strangers do that inertness knows; convolutions, which hear no words, ask for more of it.
_EMBEDDED = replace(
    _PAPER,
    rank=4,
    batch=4,
    inert_batch=4,
    unet_rate=3e-3,
    text_encoder_rate=3e-4,
    token_rate=5e-4,
    token_distance=1.5,
    inertness=2.0,
    weakest_first=True,
    isolation=4,
    background=1.0,
    scenes=0.35,
    mixing=0.45,
    layers=(*ATTENTION_LAYERS, *FEED_FORWARD_LAYERS, *CONVOLUTION_LAYERS),
)
_IN_ONE_GO = {
    "isolation": 0,
    "inertness": 0.5,
    "inert_batch": 1,
    "scenes": 0.0,
    "token_distance": 0.0,
    "token_rate": 5e-3,
}
_LONG, _OF_MANY = 1600, {"unet_rate": 1.5e-3, "text_encoder_rate": 1.5e-4}
# A rotation turns directions and keeps their singular values, so what it can change is as strong as they are.
_ROTATIONAL = {"weakest_first": False, "unet_rate": 1e-2, "text_encoder_rate": 3e-3}
LINEAR = {"rank": 8, "layers": (*ATTENTION_LAYERS, *FEED_FORWARD_LAYERS)}
"""What is chosen on the embedded base where only linear layers are adapted, as PEFT's forms and comparisons with them want it."""
_OF_FORM: dict[str, dict[str, Any]] = {"rotational": _ROTATIONAL, **dict.fromkeys(TUNERS, LINEAR)}
_FOR_EMBEDDED_BASE = {
    "fast": replace(_EMBEDDED, steps=150, scenes=0.0),  # drawing the scenes takes nearly as long
    "balanced": replace(_EMBEDDED, steps=1600),
    "best": replace(_EMBEDDED, steps=2500),
}


def preset(name: str, base: Base, *, concepts: int = 1, changes: Mapping[str, Any] = MappingProxyType({})) -> TrainingSettings:
    """Return the settings called `name` for `base`: the paper's rates for real checkpoints, faster ones for the embedded base.

    Args:
        concepts: how many are trained in one go. Several on the embedded base are not isolated: they learn to bear each other,
            and the bands of five are half of the directions of its narrow layers. Their tokens begin at their class words and
            move as they like: they know each other's, and five that began apart were lost in regions. They are shown beside
            each other (`mixing`) and not in scenes, which made it worse there. Of inertness a little does. More than two of the
            additive form move half as fast in trainings of 1,600 steps and more: what all of them move adds up, and pictures of
            three were lost in it. LoRAs were not.
        changes: settings that are chosen otherwise. On the embedded base the rotational form has others beside it: the
            strongest directions and higher rates; PEFT's are put on linear layers only, at twice the rank.

    Raises:
        InputError: there is no such preset, or a change is out of range.
    """
    embedded = base.family == "mini"
    presets = _FOR_EMBEDDED_BASE if embedded else _FOR_REAL_BASES
    if name not in presets:
        raise InputError(f"There is no preset '{name}'; choose one of {', '.join(PRESETS)}.")
    in_one_go = _IN_ONE_GO if embedded and concepts > 1 else {}
    form = changes.get("parametrisation", _PAPER.parametrisation)
    is_long = changes.get("steps", presets[name].steps) >= _LONG
    of_many = _OF_MANY if embedded and is_long and concepts > 2 and form == _PAPER.parametrisation else {}
    of_form = _OF_FORM.get(form, {}) if embedded else {}
    return replace(presets[name], **{**in_one_go, **of_many, **of_form, **changes})
