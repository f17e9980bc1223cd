"""The share of a token's attention outside the mask: what it is, and that training lowers it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from short_trainings import BAND, SHORT, prepare_less

from spectral_diffusion.bases.base import Base
from spectral_diffusion.concepts.concept import Concept
from spectral_diffusion.prompts.conditioning import encode, tokenize
from spectral_diffusion.training import TrainingProgress, run, train
from spectral_diffusion.training.attention import watched_attention
from spectral_diffusion.training.batches import Batch
from spectral_diffusion.training.memory import Plan, checkpointing
from spectral_diffusion.training.run import Run


def left_half(concept: Concept) -> Concept:
    """Return the concept with masks that are white on the left half."""
    examples = []
    for example in concept.examples:
        mask = Image.new("L", example.photo.image.size)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        examples.append(replace(example, mask=mask))
    return replace(concept, examples=tuple(examples))


def test_it_is_the_share_of_the_attention_that_diffusers_computes(base: Base) -> None:
    unet, side = base.pipeline.unet, base.resolution // base.pipeline.vae_scale_factor
    noisy = torch.randn(2, unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    ids = tokenize(base, ["a dog", "a cat near a lake"])
    tokens = torch.zeros(2, ids.shape[-1])
    tokens[0, 2] = 1
    masks = (torch.arange(side) < side // 2).float().expand(2, 1, side, side)
    expected = []

    def compare(module: torch.nn.Module, inputs: object, options: dict[str, torch.Tensor], output: object) -> None:
        query, key = module.to_q(options["hidden_states"]), module.to_k(options["encoder_hidden_states"])
        weights = module.get_attention_scores(module.head_to_batch_dim(query), module.head_to_batch_dim(key))
        looks = weights.unflatten(0, (2, -1))[0, :, :, 2].unflatten(1, (round(weights.shape[1] ** 0.5), -1))
        beside = looks[..., looks.shape[-1] // 2 :].sum((1, 2)) / looks.sum((1, 2))
        expected.append(beside.mean())

    def spread(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], options: dict[str, torch.Tensor]) -> object:
        return (), options | {"hidden_states": inputs[0]} if inputs else options

    crossing = [module for name, module in unet.named_modules() if name.endswith(".attn2")]
    handles = [module.register_forward_pre_hook(spread, with_kwargs=True) for module in crossing]
    handles += [module.register_forward_hook(compare, with_kwargs=True) for module in crossing]
    with torch.no_grad(), watched_attention(unet) as seen:
        with seen.watched():
            unet(noisy, torch.tensor([10, 10]), **encode(base, ids))
            for handle in handles:
                handle.remove()
            found = seen.outside(tokens, masks)
    even = [one for one in expected if one.isfinite()]
    assert len(even) == len(crossing) and found[1] == 0
    torch.testing.assert_close(found[0], torch.stack(even).mean(), rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks for module in unet.modules())


@pytest.mark.parametrize("fails", [False, True])
def test_after_a_pass_nothing_of_it_is_held(base: Base, concept: Concept, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    prepare_less(monkeypatch)
    held: list[int] = []
    passes, predict = Run._passes, run.predict

    def watch(own: Run, batch: Batch, plan: Plan) -> torch.Tensor:
        try:
            return passes(own, batch, Plan(checkpointing=True))
        finally:
            held.append(len(own.seen.queries) + len(own.seen.keys))

    def run_out(*arguments: object) -> torch.Tensor:
        found = predict(*arguments)
        if fails and not held:
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(Run, "_passes", watch)
    monkeypatch.setattr(run, "predict", run_out)
    train(base, left_half(concept), BAND, replace(SHORT, steps=2, attention=1.0))
    assert held == [0] * (3 if fails else 2)


@pytest.mark.parametrize("memory_saved", [False, True])
def test_training_keeps_the_attention_inside(
    base: Base, concept: Concept, monkeypatch: pytest.MonkeyPatch, memory_saved: bool
) -> None:
    prepare_less(monkeypatch)
    if memory_saved:
        monkeypatch.setattr("spectral_diffusion.training.run.checkpointing", lambda unet, on: checkpointing(unet, True))
    losses: dict[float, list[float]] = {}
    settings = replace(SHORT, steps=30, unet_rate=1e-2, token_rate=1e-2, inertness=0.0)
    for weight in (0.0, 50.0):

        def note(progress: TrainingProgress, weight: float = weight) -> None:
            losses.setdefault(weight, []).append(progress.concept_loss)

        train(base, left_half(concept), BAND, replace(settings, attention=weight), on_progress=note)
    outside = [(whole - plain) / 50 for plain, whole in zip(losses[0.0], losses[50.0], strict=True)]
    assert 0 < outside[0] < 1  # the first step is the same in both
    assert sum(losses[50.0][-5:]) < 0.8 * sum(losses[50.0][:5])


def test_without_masks_nothing_is_outside(base: Base, concept: Concept, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_less(monkeypatch)
    whole = replace(concept, examples=tuple(replace(example, mask=None) for example in concept.examples))
    one, other = (train(base, whole, BAND, replace(SHORT, attention=weight)).adapter for weight in (0.0, 1.0))
    for key in one.layer_keys():
        torch.testing.assert_close(one.delta(key).dense(), other.delta(key).dense(), rtol=0, atol=1e-6)
