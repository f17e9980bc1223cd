"""Every concept of a picture drawn by its own model, of which counts what it predicts for the concept's regions.

All models look at the same noisy picture and read of the others by their class words, so the scene is one; but no concept's
change meets another's, so none is lost, however the concepts were trained (predictions put together by place: Bar-Tal et al.
2023, arXiv 2302.08113). The base is the same for all of them, so one pass of the UNet carries a sample for each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.attach import Factors, beside, fixed, hooked
from spectral_diffusion.bases.base import Base, adaptable_layers
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.regional_attention import Layout, layout_of, regional_attention
from spectral_diffusion.joining import LowRank
from spectral_diffusion.prompts.conditioning import encode_prompts, parts_needed
from spectral_diffusion.prompts.tokens import name_by_class, tokens_in


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What one sample passes through.

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


@contextmanager
def own_models(base: Base, drawing: Drawing, adapter: Adapter) -> Iterator[int]:
    """While entered, the UNet of `base` predicts each region of `drawing` with the concepts that it names attached alone.

    A concept that no region names acts everywhere. What belongs to no concept's region counts evenly from all models. Gives how
    many samples go through the UNet for a picture: one per model, and one for what shall not be there.

    Args:
        adapter: the base must know its tokens, with nothing attached.
    """
    layout = layout_of(base, drawing)
    halves = _halves(base, drawing, adapter, layout)
    halves = halves if drawing.guidance > 1 else halves[1:]
    models = [model for half in halves for model in half]
    layers = {key: layer for key, layer in adaptable_layers(base, None).items() if key.startswith("unet.")}
    with (
        regional_attention(base.pipeline.unet, layout) as regional,
        hooked(layers, _factors(base, adapter, models, layers)),
        _put_together(base, halves),
    ):
        regional.read([torch.cat(texts) for texts in zip(*(model.texts for model in models), strict=True)])
        yield len(models)


def _halves(base: Base, drawing: Drawing, adapter: Adapter, layout: Layout) -> list[list[_Model]]:
    """Return the models of the negative and of the wanted half of a batch."""
    tokens, shares = adapter.tokens, layout.shares
    named = [frozenset(tokens_in(region.prompt, tokens)) for region in drawing.regions]
    everywhere = frozenset(tokens).difference(*named)
    groups = list(dict.fromkeys(own | everywhere for own in named if own)) or [everywhere]
    own = [
        sum((shares[n] for n, one in enumerate(named) if one and one | everywhere == group), 0 * shares[0]) for group in groups
    ]
    rest = (1 - sum(own)) / len(groups)
    shared = frozenset.intersection(*groups)
    prompts = _prompts(base, drawing, adapter, (shared, *groups))
    wanted = [
        _model(base, adapter, group, prompts[group], share + rest, negative=False)
        for group, share in zip(groups, own, strict=True)
    ]
    return [[_model(base, adapter, shared, prompts[shared], torch.ones_like(rest), negative=True)], wanted]


def _prompts(
    base: Base, drawing: Drawing, adapter: Adapter, groups: Collection[frozenset[str]]
) -> dict[frozenset[str], list[tuple[tuple[str, str], int]]]:
    """Return what the model of each group of tokens reads, and what shall not be there, of the picture and of each region.

    The other tokens stand there as class words. Beside each pair stands how many parts it has in the model where it has most, as
    one pass of the UNet takes one number only.
    """
    both = [(drawing.prompt, drawing.negative_prompt)]
    both += [(region.prompt, region.negative_prompt or drawing.negative_prompt) for region in drawing.regions]
    written: dict[frozenset[str], list[tuple[str, str]]] = {}
    for tokens in groups:
        known = {token: token if token in tokens else word for token, word in adapter.class_words.items()}
        written[tokens] = [(name_by_class(prompt, known), name_by_class(negative, known)) for prompt, negative in both]
    words = _words(adapter)
    parts = [parts_needed(base, [text for pair in same for text in pair], words) for same in zip(*written.values(), strict=True)]
    return {tokens: list(zip(pairs, parts, strict=True)) for tokens, pairs in written.items()}


@torch.no_grad()
def _model(
    base: Base,
    adapter: Adapter,
    tokens: frozenset[str],
    prompts: Sequence[tuple[tuple[str, str], int]],
    share: torch.Tensor,
    *,
    negative: bool,
) -> _Model:
    """Return the model with `tokens` attached, which reads what `_prompts` gave, or if `negative` what shall not be there."""
    with beside(base, adapter.only(tokens)):
        whole, *inside = (
            _row(encode_prompts(base, pair, _words(adapter), least=parts), int(negative)) for pair, parts in prompts
        )
    texts = tuple(own["encoder_hidden_states"] for own in inside)
    return _Model(tokens=tokens, conditioning=whole, texts=texts, share=share)


def _words(adapter: Adapter) -> dict[str, str]:
    return {concept.token: concept.words for concept in adapter.concepts}


def _row(conditioning: dict[str, Any], number: int) -> dict[str, Any]:
    """Return what is read for sample `number`."""
    return _each(lambda value: value[number : number + 1], conditioning)


def _each(change: Callable[..., torch.Tensor], *conditionings: dict[str, Any]) -> dict[str, Any]:
    """Return what `change` makes of every tensor of conditionings that have the same names."""
    return {
        name: _each(change, *(one[name] for one in conditionings))
        if isinstance(value, dict)
        else change(*(one[name] for one in conditionings))
        for name, value in conditionings[0].items()
    }


def _factors(base: Base, adapter: Adapter, models: Sequence[_Model], layers: Collection[str]) -> dict[str, Factors]:
    """Return each layer's `up (models, out, k)` and `down (models, in, k)`, those of a model that leaves it alone being zero."""
    changes = {model.tokens: adapter.only(model.tokens).deltas() for model in models}
    factors = {}
    for key, whole in adapter.deltas().items():
        if key in layers:
            none = LowRank(up=whole.up[:, :0], down=whole.down[:, :0])
            own = [changes[model.tokens].get(key, none) for model in models]
            padded = [change.padded(max(one.rank for one in own)) for change in own]
            stacked = (torch.stack([getattr(change, name) for change in padded]) for name in ("up", "down"))
            factors[key] = fixed(*(factor.to(base.device, base.pipeline.unet.dtype) for factor in stacked))
    return factors


@contextmanager
def _put_together(base: Base, halves: Sequence[Sequence[_Model]]) -> Iterator[None]:
    """While entered, the UNet of `base` predicts what the models of each half of a batch predict, each as far as it counts."""
    unet, models = base.pipeline.unet, [model for half in halves for model in half]
    alone = unet.forward
    conditioning = _each(lambda *values: torch.cat(values), *(model.conditioning for model in models))
    shares = torch.stack([model.share for model in models])[:, None, None]

    def forward(
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        down_intrablock_additional_residuals: list[torch.Tensor] | None = None,
        **named: Any,
    ) -> UNet2DConditionOutput:
        count = len(sample) // len(halves)
        rows = torch.arange(len(sample), device=sample.device).view(len(halves), count)
        rows = torch.cat([own for own, half in zip(rows, halves, strict=True) for _ in half])  # of which each sample is a copy
        times = timestep[rows] if timestep.dim() else timestep
        read = _each(lambda value: value.repeat_interleave(count, dim=0), conditioning)
        if added_cond_kwargs is not None:  # the sizes are the picture's
            read["added_cond_kwargs"]["time_ids"] = added_cond_kwargs["time_ids"][rows]
        if down_intrablock_additional_residuals is not None:
            read["down_intrablock_additional_residuals"] = [level[rows] for level in down_intrablock_additional_residuals]
        predicted = alone(sample[rows], times, **read, **named)[0]
        counting = predicted.unflatten(0, (len(models), count)) * shares.to(predicted)
        return UNet2DConditionOutput(sample=torch.cat([own.sum(0) for own in counting.split([len(half) for half in halves])]))

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward
