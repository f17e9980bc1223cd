"""Every concept of a picture drawn by its own model, of which counts what it predicts for the concept's regions.

All models look at the same noisy picture and read of the others by their class words, so the scene is one; but no concept's
change meets another's, so none is lost, however the concepts were trained (predictions put together by place: Bar-Tal et al.
2023, arXiv 2302.08113). It takes a pass of the UNet for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from spectral_diffusion.adapter import Adapter
from spectral_diffusion.attach import Switch, beside
from spectral_diffusion.base import Base
from spectral_diffusion.conditioning import encode_prompts
from spectral_diffusion.drawing import Drawing
from spectral_diffusion.prompt_tokens import name_by_class, tokens_in
from spectral_diffusion.regional_attention import Layout, RegionalTexts, layout_of, regional_attention


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """One pass of the UNet.

    Attributes:
        tokens: the concepts that are attached.
        conditioning: what is read, of one sample, as `conditioning.encode` returns it.
        texts: what is read inside each region, `(1, length, width)` each.
        share: `(height, width)` in latent positions, how much what is predicted counts.
    """

    tokens: frozenset[str]
    conditioning: dict[str, Any]
    texts: tuple[torch.Tensor, ...]
    share: torch.Tensor


class _Concepts:
    """The concepts of an adapter on a base that knows their tokens, each of which can be turned on."""

    def __init__(self, base: Base, adapter: Adapter, stack: ExitStack):
        self.adapter, self.switches = adapter, {token: Switch(on=False) for token in adapter.tokens}
        for token, switch in self.switches.items():
            stack.enter_context(beside(base, adapter.only([token]), switch=switch))

    def turn_on(self, tokens: frozenset[str]) -> None:
        """Let the concepts called `tokens` act from now on, and no others."""
        for token, switch in self.switches.items():
            switch.on = token in tokens


@contextmanager
def own_models(base: Base, drawing: Drawing, adapter: Adapter) -> Iterator[None]:
    """While entered, the UNet of `base` predicts each region of `drawing` with the concepts that it names attached alone.

    A concept that no region names acts everywhere. What belongs to no concept's region counts evenly from all passes.

    Args:
        adapter: the base must know its tokens, with nothing attached.
    """
    layout = layout_of(base, drawing)
    with ExitStack() as stack:
        concepts = _Concepts(base, adapter, stack)
        regional = stack.enter_context(regional_attention(base.pipeline.unet, layout))
        halves = _passes(base, drawing, concepts, layout)
        stack.enter_context(_put_together(base, concepts, regional, halves if drawing.guidance > 1 else halves[1:]))
        yield


def _passes(base: Base, drawing: Drawing, concepts: _Concepts, layout: Layout) -> list[list[_Pass]]:
    """Return the passes of the negative and of the wanted half of a batch."""
    tokens, shares = concepts.adapter.tokens, layout.shares
    named = [frozenset(tokens_in(region.prompt, tokens)) for region in drawing.regions]
    everywhere = frozenset(tokens).difference(*named)
    models = list(dict.fromkeys(own | everywhere for own in named if own)) or [everywhere]
    own = [
        sum((shares[n] for n, one in enumerate(named) if one and one | everywhere == model), 0 * shares[0]) for model in models
    ]
    rest = (1 - sum(own)) / len(models)
    wanted = [
        _reading(base, concepts, model, [drawing.prompt, *(region.prompt for region in drawing.regions)], share + rest)
        for model, share in zip(models, own, strict=True)
    ]
    unwanted = [drawing.negative_prompt, *(region.negative_prompt or drawing.negative_prompt for region in drawing.regions)]
    return [[_reading(base, concepts, frozenset.intersection(*models), unwanted, torch.ones_like(rest))], wanted]


@torch.no_grad()
def _reading(base: Base, concepts: _Concepts, tokens: frozenset[str], prompts: Sequence[str], share: torch.Tensor) -> _Pass:
    """Return the pass that reads the picture's and the regions' `prompts` with `tokens` attached, the others by class word."""
    adapter = concepts.adapter
    words = {concept.token: concept.words for concept in adapter.concepts}
    known = {token: token if token in tokens else word for token, word in adapter.class_words.items()}
    concepts.turn_on(tokens)
    whole, *inside = (encode_prompts(base, [name_by_class(prompt, known)], words) for prompt in prompts)
    texts = tuple(own["encoder_hidden_states"] for own in inside)
    return _Pass(tokens=tokens, conditioning=whole, texts=texts, share=share)


@contextmanager
def _put_together(base: Base, concepts: _Concepts, regional: RegionalTexts, halves: Sequence[Sequence[_Pass]]) -> Iterator[None]:
    """While entered, the UNet of `base` predicts what the passes of each half of a batch predict, each as far as it counts."""
    unet = base.pipeline.unet
    alone = unet.forward

    def forward(
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        down_intrablock_additional_residuals: list[torch.Tensor] | None = None,
        **named: Any,
    ) -> UNet2DConditionOutput:
        predicted = []
        for number, (half, passes) in enumerate(zip(sample.chunk(len(halves)), halves, strict=True)):
            whole = torch.zeros_like(half)
            for one in passes:
                read = _for_batch(one.conditioning, len(half))
                if added_cond_kwargs is not None:  # the sizes are the picture's
                    read["added_cond_kwargs"]["time_ids"] = added_cond_kwargs["time_ids"].chunk(len(halves))[number]
                if down_intrablock_additional_residuals is not None:
                    levels = [level.chunk(len(halves))[number] for level in down_intrablock_additional_residuals]
                    read["down_intrablock_additional_residuals"] = levels
                concepts.turn_on(one.tokens)
                regional.read(one.texts)
                whole += one.share.to(half) * alone(half, timestep, **read, **named)[0]
            predicted.append(whole)
        return UNet2DConditionOutput(sample=torch.cat(predicted))

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward


def _for_batch(conditioning: dict[str, Any], count: int) -> dict[str, Any]:
    """Return what is read for one sample, for `count` of them."""
    return {
        name: _for_batch(value, count) if isinstance(value, dict) else value.expand(count, *value.shape[1:])
        for name, value in conditioning.items()
    }
