"""How captions condition the UNet, for every family: the one place that knows which text states each reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import CLIPTokenizer

from spectral_diffusion.attach import layer_by_layer
from spectral_diffusion.base import Base
from spectral_diffusion.cross_attention import side_by_side
from spectral_diffusion.prompt_tokens import expand_prompt
from spectral_diffusion.prompt_weights import Piece, parse_prompt


def tokenize(base: Base, captions: Sequence[str]) -> torch.Tensor:
    """Return token ids `(n, text encoders, context length)` of `captions`, padded and cut as the pipeline does."""
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


def encode_prompts(base: Base, texts: Sequence[str], words: Mapping[str, str]) -> dict[str, Any]:
    """Return what `encode` does for prompts that may hold weights and `BREAK` (see `prompt_weights`).

    The parts between `BREAK`s are encoded each by itself and stand one behind the other, `(n, parts * length, width)`; prompts
    with fewer parts than others are filled up with empty ones. A word's weight stretches how its state differs from that of no
    words, as in ComfyUI; AUTOMATIC1111 multiplies the states and brings back their mean, which fails where that is near 0.

    Args:
        words: each token of the adapter to the words that stand for it.

    Raises:
        InputError: a weight is malformed.
    """
    parsed = [parse_prompt(text, words) for text in texts]
    most = max(1, *map(len, parsed))
    parts = [part for own in parsed for part in (*own, *((),) * (most - len(own)))]
    pieces = [[_pieces(tokenizer, part, words) for tokenizer in base.tokenizers.values()] for part in parts]
    conditioning = encode(base, torch.tensor([[ids for ids, _ in part] for part in pieces], device=base.device))
    states = conditioning["encoder_hidden_states"]
    weights = torch.tensor([part[0][1] for part in pieces]).to(states)[..., None]
    if (weights != 1).any():
        empty = encode(base, tokenize(base, [""]))["encoder_hidden_states"]
        states = torch.where(weights == 1, states, torch.lerp(empty.expand_as(states), states, weights))
    conditioning["encoder_hidden_states"] = states.unflatten(0, (-1, most)).flatten(1, 2)
    if "added_cond_kwargs" in conditioning:
        conditioning["added_cond_kwargs"] = {name: value[::most] for name, value in conditioning["added_cond_kwargs"].items()}
    return conditioning


def _pieces(tokenizer: CLIPTokenizer, part: Sequence[Piece], words: Mapping[str, str]) -> tuple[list[int], list[float]]:
    """Return the token ids of one part of a prompt and their weights, padded and cut as the pipeline does."""
    ids, weights, room = [], [], tokenizer.model_max_length - 2
    for piece in part:
        found = tokenizer(expand_prompt(piece.text, words), add_special_tokens=False, verbose=False).input_ids
        ids, weights = ids + found, weights + [piece.weight] * len(found)
    ids = [tokenizer.bos_token_id, *ids[:room], tokenizer.eos_token_id]
    padding = tokenizer.model_max_length - len(ids)
    return ids + [tokenizer.pad_token_id] * padding, [1.0, *weights[:room], 1.0] + [1.0] * padding


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
