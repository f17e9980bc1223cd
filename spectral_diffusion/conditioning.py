"""How captions condition the UNet, for every family: the one place that knows which text states each reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from spectral_diffusion.base import Base


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


def encode(base: Base, ids: torch.Tensor) -> dict[str, Any]:
    """Return what the UNet takes beside noisy latents and times, for token `ids (n, text encoders, length)`.

    SDXL reads the states before the last layer of both text encoders side by side, the second one's pooled output, and six
    numbers: size of the original, corner of the crop, size of the picture (Podell et al. 2023, arXiv 2307.01952, section 2.2).
    """
    if base.family != "sdxl":
        return {"encoder_hidden_states": base.pipeline.text_encoder(ids[:, 0]).last_hidden_state}
    first, second = (model(ids[:, number], output_hidden_states=True) for number, model in enumerate(base.text_encoders.values()))
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    side = base.resolution
    sizes = torch.tensor([side, side, 0, 0, side, side], dtype=states.dtype, device=states.device).repeat(len(ids), 1)
    return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": second.text_embeds, "time_ids": sizes}}


def prompts(base: Base, captions: Sequence[str], negative: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """Return what the pipeline takes in place of `captions` and `negative` ones, by the names of its arguments.

    The pipeline's own reading would expand the tokens of several vectors a second time.
    """
    named = {}
    for prefix, texts in (("", captions), ("negative_", negative)):
        if texts is not None:
            conditioning = encode(base, tokenize(base, texts))
            named[f"{prefix}prompt_embeds"] = conditioning["encoder_hidden_states"]
            if "added_cond_kwargs" in conditioning:
                named[f"{prefix}pooled_prompt_embeds"] = conditioning["added_cond_kwargs"]["text_embeds"]
    return named
