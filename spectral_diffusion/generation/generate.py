"""Draw pictures with an adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from inspect import signature

import diffusers
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, SchedulerMixin
from PIL import Image

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.attach import attached, check_fits_base, with_tokens
from spectral_diffusion.adapters.fusion import shown_together
from spectral_diffusion.bases.base import Base
from spectral_diffusion.errors import InputError
from spectral_diffusion.generation.condition_picture import following
from spectral_diffusion.generation.drawing import SCHEDULERS, Drawing, Picture
from spectral_diffusion.generation.own_models import own_models
from spectral_diffusion.generation.previews import OnPreview, decoded, watching
from spectral_diffusion.generation.regional_attention import layout_of, regional_attention
from spectral_diffusion.prompts.conditioning import encode_prompts, pipeline_arguments
from spectral_diffusion.prompts.tokens import marked_words, tokens_in

logger = logging.getLogger(__name__)

_NEARLY_NOTHING = 2**-24
"""How much of a picture is left at the end of a schedule that ends in noise; at 0 its strength would be infinite, as in Euler."""


def named_only(adapter: Adapter, prompt: str) -> Adapter:
    """Return `adapter` with only the concepts whose tokens stand in `prompt`: one that is not asked for cannot disturb."""
    return adapter.only(tokens_in(prompt, adapter.tokens))


def generate(
    base: Base,
    drawing: Drawing,
    adapter: Adapter | None = None,
    *,
    whole: bool = False,
    batch: int = 8,
    on_picture: Callable[[Picture], None] = lambda picture: None,
    on_preview: OnPreview | None = None,
) -> list[Picture]:
    """Draw `drawing.count` pictures, the n-th with seed `drawing.seed + n` whatever the batch.

    Args:
        adapter: what is attached while drawing; nothing when missing.
        whole: attach every concept of the adapter, as an exported file does in other tools, not only those in the prompt.
        batch: pictures drawn at once, fewer where more than two samples go through the UNet for each, or where a GPU's memory
            does not suffice.
        on_picture: called with each picture when it is ready.
        on_preview: called with a seed and its picture as it forms, a few times on the way; that takes the decoder's time.

    Raises:
        AdapterError: the adapter does not fit the base.
        InputError: a region names a token that the adapter does not have, a weight in a prompt is malformed, or the condition
            does not suit the picture or the base; or what is drawn is beyond all numbers, or a single picture beyond the memory.
    """
    _check_regions(drawing, adapter.tokens if adapter else ())
    if adapter is not None and not whole:
        adapter = _asked_for(adapter, drawing)
    drawing = _decided(drawing, base, adapter)
    words = {concept.token: concept.words for concept in adapter.concepts} if adapter else {}
    class_words = adapter.class_words if adapter else {}
    pictures = []
    with ExitStack() as stack:
        samples = stack.enter_context(_concepts_and_regions(base, drawing, adapter, words))
        stack.enter_context(_condition(base, drawing))
        stack.enter_context(_scheduler(base, drawing.scheduler))
        for seed, image in _drawn(base, drawing, words, max(1, 2 * batch // max(2, samples)), on_preview):
            picture = Picture(image=image, seed=seed, drawing=drawing, tokens=tuple(words), class_words=dict(class_words))
            on_picture(picture)
            pictures.append(picture)
    return pictures


def _asked_for(adapter: Adapter, drawing: Drawing) -> Adapter:
    """Return what `named_only` does, and say which tokens mean nothing where they stand."""
    named = named_only(adapter, drawing.words)
    negative = "\n".join([drawing.negative_prompt, *(region.negative_prompt for region in drawing.regions)])
    lost = [token for token in tokens_in(negative, adapter.tokens) if token not in named.tokens]
    if lost:
        logger.warning(
            "Only the negative prompt names %s, which so means nothing there; draw with the whole adapter, or leave it out.",
            ", ".join(lost),
        )
    return named


def _decided(drawing: Drawing, base: Base, adapter: Adapter | None) -> Drawing:
    """Return `drawing` with what it leaves open."""
    if drawing.guidance is None:
        drawing = replace(drawing, guidance=base.guidance)
    if drawing.confined is None:
        drawing = replace(drawing, confined=adapter is not None and not shown_together(adapter.concepts))
    return drawing


def _check_regions(drawing: Drawing, tokens: Sequence[str]) -> None:
    for region in drawing.regions:
        unknown = marked_words(region.prompt, tokens)
        if unknown:
            having = f"has {', '.join(tokens)}" if tokens else "is missing"
            raise InputError(f"A region names '{unknown[0]}', but the adapter {having}; name one of its tokens or a plain word.")


def _size(base: Base, drawing: Drawing) -> tuple[int, int]:
    return drawing.size or (base.resolution, base.resolution)


@contextmanager
def _concepts_and_regions(base: Base, drawing: Drawing, adapter: Adapter | None, words: dict[str, str]) -> Iterator[int]:
    """While entered, the base draws with `adapter`, and each region of the drawing from its own prompt.

    Gives how many samples go through the UNet for a picture.
    """
    if adapter is not None and adapter.concepts and drawing.regions and drawing.confined:
        check_fits_base(base, adapter)
        with with_tokens(base, adapter.embeddings), own_models(base, drawing, adapter) as samples:
            yield samples
        return
    with ExitStack() as stack:
        if adapter is not None and adapter.concepts:
            stack.enter_context(attached(base, adapter))
        if drawing.regions:
            regional = stack.enter_context(regional_attention(base.pipeline.unet, layout_of(base, drawing)))
            regional.read(_regional_texts(base, drawing, words))
        yield 2 if drawing.guidance > 1 else 1


@torch.no_grad()
def _regional_texts(base: Base, drawing: Drawing, words: dict[str, str]) -> list[torch.Tensor]:
    """Return the states of each region's negative and own prompt, of the own one alone without guidance."""
    texts = []
    for region in drawing.regions:
        captions = [region.negative_prompt or drawing.negative_prompt, region.prompt]
        guided = drawing.guidance > 1  # the pipeline reads no negative prompt otherwise
        texts.append(encode_prompts(base, captions if guided else captions[1:], words)["encoder_hidden_states"])
    return texts


def _condition(base: Base, drawing: Drawing) -> AbstractContextManager[None]:
    return nullcontext() if drawing.condition is None else following(base, drawing.condition, *_size(base, drawing))


def _drawn(
    base: Base, drawing: Drawing, words: dict[str, str], batch: int, on_preview: OnPreview | None
) -> Iterator[tuple[int, Image.Image]]:
    """Yield seed and picture, `batch` drawn at once, and half as many from where memory does not suffice for them."""
    left = range(drawing.seed, drawing.seed + drawing.count)
    while left:
        seeds = left[:batch]
        try:
            images = _draw(base, drawing, words, seeds, on_preview)
        except torch.OutOfMemoryError as error:
            batch = len(seeds) // 2
            if not batch:
                width, height = _size(base, drawing)
                raise InputError(
                    f"Memory does not suffice for a picture of {width} x {height} pixels; choose a smaller size, or close what "
                    "else uses the GPU."
                ) from error
            logger.warning("Memory does not suffice for %d pictures at once; it goes on with %d.", len(seeds), batch)
        else:
            yield from zip(seeds, images, strict=True)
            left = left[batch:]


@torch.no_grad()
def _draw(
    base: Base, drawing: Drawing, words: dict[str, str], seeds: Sequence[int], on_preview: OnPreview | None
) -> list[Image.Image]:
    watched = watching(base, drawing.steps, seeds, on_preview) if on_preview is not None else {}
    width, height = _size(base, drawing)
    factor, unet = base.pipeline.vae_scale_factor, base.pipeline.unet
    shape = (unet.config.in_channels, height // factor, width // factor)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])  # the same in any precision
    latents = base.pipeline(
        **_texts(base, drawing, words, len(seeds)),
        num_inference_steps=drawing.steps,
        guidance_scale=drawing.guidance,
        width=width,
        height=height,
        generator=generators,
        latents=noise.to(base.device, unet.dtype),
        output_type="latent",
        **watched,
    ).images
    if not torch.isfinite(latents).all():
        numbers = str(unet.dtype).removeprefix("torch.")
        raise InputError(f"The picture came to numbers that {numbers} does not hold; lower the strengths or the guidance.")
    return [image for one in latents.split(1) for image in decoded(base, one)]  # by itself: large pictures take gigabytes


def _texts(base: Base, drawing: Drawing, words: dict[str, str], count: int) -> dict[str, torch.Tensor]:
    """Return what the pipeline takes in place of the prompts, `count` times each; its own reading knows no weights."""
    both = pipeline_arguments(encode_prompts(base, [drawing.prompt, drawing.negative_prompt], words))
    repeated = {name: value.repeat_interleave(count, dim=0).chunk(2) for name, value in both.items()}
    wanted = {name: positive for name, (positive, _) in repeated.items()}
    return wanted | {f"negative_{name}": negative for name, (_, negative) in repeated.items()}


class _scheduler:
    """While entered, the base draws with the sampler called `name`."""

    def __init__(self, base: Base, name: str):
        kind, options = SCHEDULERS[name]
        self.pipeline, self.kept = base.pipeline, base.pipeline.scheduler
        sampler = getattr(diffusers, kind)
        self.chosen = sampler.from_config(self.kept.config, **_noise_of(self.kept, sampler), **options)

    def __enter__(self) -> None:
        self.pipeline.scheduler = self.chosen

    def __exit__(self, *exception: object) -> None:
        self.pipeline.scheduler = self.kept


def _noise_of(kept: DDIMScheduler, sampler: type[SchedulerMixin]) -> dict[str, list[float]]:
    """Return the noise that a base was trained with, if its end is nothing but noise and `sampler` cannot work that out.

    Heun's begins with less: its first step averages slopes at both of its ends, and from so much noise it lands far off (on the
    embedded base 25 steps end 9 levels of 255 from what 200 of DDIM give, 2 levels with less noise).
    """
    knows = "rescale_betas_zero_snr" in signature(sampler).parameters
    if not kept.config.rescale_betas_zero_snr or knows or sampler is HeunDiscreteScheduler:
        return {}
    remaining = kept.alphas_cumprod.cpu().double()  # a training puts them where it computes, and Apple's GPUs know no float64
    remaining[-1] = _NEARLY_NOTHING
    return {"trained_betas": [1 - remaining[0].item(), *(1 - remaining[1:] / remaining[:-1]).tolist()]}
