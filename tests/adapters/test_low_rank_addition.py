"""A low-rank change beside a layer: the numbers and gradients are those that autograd gives, and little is kept for them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from spectral_diffusion.adapters.attach import hooked
from spectral_diffusion.adapters.low_rank_addition import add_low_rank


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_(True)


def plainly(output: torch.Tensor, values: torch.Tensor, up: torch.Tensor, down: torch.Tensor, counts: object) -> torch.Tensor:
    """Return the same by autograd's own operations."""
    ups, downs = (factor if factor.dim() == 3 else factor[None] for factor in (up, down))
    parts = []
    for own, one_up, one_down in zip(values.chunk(len(ups)), ups, downs, strict=True):
        read = (own @ one_down).flatten(1, -2)
        parts.append((read if counts is None else read * counts(read)) @ one_up.mT)
    return output + torch.cat(parts).view(output.shape)


@pytest.mark.parametrize("shares", [(), (2,)])
@pytest.mark.parametrize("fixed", ["", "values", "up", "down"])
@pytest.mark.parametrize("gated", [False, True])
def test_it_is_what_autograd_gives(shares: tuple[int, ...], fixed: str, gated: bool) -> None:
    output, values = numbers(4, 3, 2, 5), numbers(4, 3, 2, 6, seed=1)
    up, down = numbers(*shares, 5, 3, seed=2), numbers(*shares, 6, 3, seed=3)
    mask = torch.rand(4, 1, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    counts = (lambda read: mask[: len(read)]) if gated and not shares else None
    given = {"output": output, "values": values, "up": up, "down": down}
    if fixed:
        given[fixed].requires_grad_(False)
    results = []
    for way in (add_low_rank, plainly):
        result = way(output.clone(), values, up, down, counts)
        moved = [tensor for tensor in given.values() if tensor.requires_grad]
        results.append((result, *torch.autograd.grad((result**2).sum(), moved)))
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected)


CONVOLUTIONS = {
    "of one pixel": {"kernel_size": 1},
    "of patches": {"kernel_size": 3, "padding": 1},
    "with strides": {"kernel_size": 3, "padding": 1, "stride": 2},
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_changed_however_it_lies_in_memory(kind: str, memory_format: torch.memory_format) -> None:
    layer = nn.Conv2d(6, 5, **CONVOLUTIONS[kind]).double().requires_grad_(False).to(memory_format=memory_format)
    up, down = numbers(5, 2), numbers(layer.weight[0].numel(), 2, seed=1)
    pictures = numbers(2, 6, 3, 4, seed=2).detach().to(memory_format=memory_format).requires_grad_(True)
    with hooked({"layer": layer}, {"layer": lambda: (up, down)}):
        changed = layer(pictures)
    weight = layer.weight + (up @ down.T).view_as(layer.weight)
    expected = nn.functional.conv2d(pictures, weight, layer.bias, layer.stride, layer.padding)
    torch.testing.assert_close(changed, expected)
    for own, wanted in zip(
        *(torch.autograd.grad((one**2).sum(), (pictures, up, down)) for one in (changed, expected)), strict=True
    ):
        torch.testing.assert_close(own, wanted)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_each_share_of_a_batch_goes_through_kernels_of_its_own_as_far_as_they_count(kind: str) -> None:
    layer = nn.Conv2d(6, 5, **CONVOLUTIONS[kind]).double().requires_grad_(False)
    up, down = numbers(2, 5, 3), numbers(2, layer.weight[0].numel(), 3, seed=1)
    pictures, counted = numbers(4, 6, 3, 4, seed=2), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    with hooked({"layer": layer}, {"layer": lambda: (up, down)}, gate=lambda key, read: counted.expand(1, read.shape[1], 3)):
        together = layer(pictures)
    for share, own in enumerate(pictures.chunk(2)):
        weight = layer.weight + (up[share] * counted @ down[share].T).view_as(layer.weight)
        expected = nn.functional.conv2d(own, weight, layer.bias, layer.stride, layer.padding)
        torch.testing.assert_close(together[2 * share : 2 * share + 2], expected)


def test_it_is_written_where_the_layers_output_was() -> None:
    output, values = torch.zeros(2, 3, 5), torch.ones(2, 3, 6)
    added = add_low_rank(output, values, torch.ones(5, 1), torch.ones(6, 1))
    assert added.data_ptr() == output.data_ptr() and (output == 6).all()


@pytest.mark.parametrize(("trained", "kept"), [("up down", {(2, 3, 6)}), ("up", {(6, 1)})])
def test_what_is_kept_is_the_input_where_down_moves_and_else_what_it_reads(trained: str, kept: set[tuple[int, ...]]) -> None:
    factors = {name: numbers(size, 1).requires_grad_(name in trained.split()) for name, size in (("up", 5), ("down", 6))}
    seen: set[tuple[int, ...]] = set()
    note = partial(torch.autograd.graph.saved_tensors_hooks, unpack_hook=lambda tensor: tensor)
    values = numbers(2, 3, 6)
    with note(pack_hook=lambda tensor: (seen.add(tuple(tensor.shape)), tensor)[1]):
        add_low_rank(torch.zeros(2, 3, 5, dtype=torch.float64), values, **factors)
    assert seen - {(5, 1)} == kept | {(6, 1)}
