"""How captions condition the UNet, for every family: the one place that knows which text states each reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from spectral_diffusion.adapters.attach import layer_by_layer
from spectral_diffusion.bases.base import Base
from spectral_diffusion.bases.cross_attention import side_by_side
from spectral_diffusion.prompts.parts import empty_part, parts_of

logger = logging.getLogger(__name__)


def tokenize(base: Base, captions: Sequence[str]) -> torch.Tensor:
    """Return token ids `(n, text encoders, context length)` of `captions`, padded and cut as the pipeline does.

    One that is cut is named in a warning: a training, where all are of one length, can read no more.
    """
    _say_what_is_cut(base, captions)
    encoded = [
        tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        for tokenizer in base.tokenizers.values()
    ]
    return torch.stack(encoded, dim=1).to(base.device)


def _say_what_is_cut(base: Base, captions: Sequence[str]) -> None:
    tokenizer = next(iter(base.tokenizers.values()))
    longest = tokenizer.model_max_length
    cut = [text for text in dict.fromkeys(captions) if len(tokenizer(text, verbose=False).input_ids) > longest]
    if cut:
        others = f" and {len(cut) - 1} others" if len(cut) > 1 else ""
        logger.warning(
            "The caption '%s'%s will be read up to its %dth token only; shorten it.",
            cut[0],
            others,
            longest - 2,
        )


def word_ids(base: Base, words: str) -> torch.Tensor:
    """Return the numbers `(n)` that the first tokenizer gives the `words` that stand for a token, which the base must know."""
    tokenizer = next(iter(base.tokenizers.values()))
    return torch.tensor(tokenizer.convert_tokens_to_ids(words.split()), device=base.device)


def encode(base: Base, ids: torch.Tensor) -> dict[str, Any]:
    """Return what the UNet takes beside noisy latents and times, for token `ids (n, text encoders, length)`.

    SDXL reads the states before the last layer of both text encoders side by side, the second one's pooled output, and six
    numbers: size of the original, corner of the crop, size of the picture (Podell et al. 2023, arXiv 2307.01952, section 2.2).
    Where a token has vectors for every cross-attention layer, the states are those of `cross_attention.side_by_side`, and the
    pooled output is the mean over the layers.
    """
    with layer_by_layer(base) as layers:
        each = ids.repeat_interleave(layers, dim=0)
        if base.family != "sdxl":
            return {"encoder_hidden_states": side_by_side(base.pipeline.text_encoder(each[:, 0]).last_hidden_state, layers)}
        encoders = enumerate(base.text_encoders.values())
        first, second = (model(each[:, number], output_hidden_states=True) for number, model in encoders)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    pooled = second.text_embeds.unflatten(0, (-1, layers)).mean(1)
    side = base.resolution
    sizes = torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32, device=states.device).repeat(len(ids), 1)
    return {
        "encoder_hidden_states": side_by_side(states, layers),
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes},
    }


def encode_prompts(base: Base, texts: Sequence[str], words: Mapping[str, str], *, least: int = 1) -> dict[str, Any]:
    """Return what `encode` does for prompts of any length that may hold weights and `BREAK` (see `prompt_weights`).

    Their parts (see `prompt_parts`) are encoded each by itself and stand one behind the other, `(n, parts * length, width)`;
    prompts with fewer parts than others are filled up with empty ones. A word's weight stretches how its state differs from that
    of no words, as in ComfyUI; AUTOMATIC1111 multiplies the states and brings back their mean, which fails where that is near 0.

    Args:
        words: each token of the adapter to the words that stand for it.
        least: fill up to so many parts.

    Raises:
        InputError: a weight is malformed.
    """
    tokenizers = list(base.tokenizers.values())
    read = [[parts_of(tokenizer, text, words) for text in texts] for tokenizer in tokenizers]
    most = max(least, *(len(parts) for own in read for parts in own))
    filled = [
        [part for parts in own for part in (*parts, *[empty_part(tokenizer)] * (most - len(parts)))]
        for tokenizer, own in zip(tokenizers, read, strict=True)
    ]
    ids = torch.tensor([[part.ids for part in own] for own in filled], device=base.device).transpose(0, 1)
    conditioning = encode(base, ids)
    states = conditioning["encoder_hidden_states"]
    weights = torch.tensor([part.weights for part in filled[0]]).to(states)[..., None]
    if (weights != 1).any():
        empty = encode(base, tokenize(base, [""]))["encoder_hidden_states"]
        states = torch.where(weights == 1, states, torch.lerp(empty.expand_as(states), states, weights))
    conditioning["encoder_hidden_states"] = states.unflatten(0, (-1, most)).flatten(1, 2)
    if "added_cond_kwargs" in conditioning:
        conditioning["added_cond_kwargs"] = {name: value[::most] for name, value in conditioning["added_cond_kwargs"].items()}
    return conditioning


def parts_needed(base: Base, texts: Sequence[str], words: Mapping[str, str]) -> int:
    """Return how many parts the longest of `texts` has; see `encode_prompts`."""
    return max(len(parts_of(tokenizer, text, words)) for tokenizer in base.tokenizers.values() for text in texts)


def prompts(base: Base, captions: Sequence[str], negative: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """Return what the pipeline takes in place of `captions` and `negative` ones (none: empty), by the names of its arguments.

    The pipeline's own reading would expand the tokens of several vectors a second time, and knows no vectors by layer.
    """
    return read(base, captions) | read(base, negative or [""] * len(captions), "negative_")


def read(base: Base, captions: Sequence[str], prefix: str = "") -> dict[str, torch.Tensor]:
    """Return what the pipeline takes in place of `captions`; see `pipeline_arguments`."""
    return pipeline_arguments(encode(base, tokenize(base, captions)), prefix)


def pipeline_arguments(conditioning: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Return `conditioning` by the names of the pipeline's arguments; `negative_` is the prefix of what shall not be there."""
    named = {f"{prefix}prompt_embeds": conditioning["encoder_hidden_states"]}
    if "added_cond_kwargs" in conditioning:
        named[f"{prefix}pooled_prompt_embeds"] = conditioning["added_cond_kwargs"]["text_embeds"]
    return named
