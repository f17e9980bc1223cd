"""Fusing: exact sums, and refusals that say what to do."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from random_adapters import FORMS, random_adapter
from shared_bases import BASES, shared_base

from spectral_diffusion.adapters.adapter import Adapter, input_group
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base, adaptable_layers
from spectral_diffusion.errors import AdapterError, BandError
from spectral_diffusion.joining import FUSERS

EXACT = 1e-5
"""Largest relative difference in float32 (issue 2, exactness)."""


def on_bands_of_their_own(base: Base, forms: Sequence[str], *, measured: bool = False) -> list[Adapter]:
    return [
        random_adapter(base, form, token=f"<V{number}>", start=2 * number, seed=number, measured=measured)
        for number, form in enumerate(forms, start=1)
    ]


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("which", BASES)
def test_the_fused_delta_is_the_sum_of_the_deltas(which: str, tiny_base_folder: Path) -> None:
    base = shared_base(which, tiny_base_folder)
    adapters, strengths = on_bands_of_their_own(base, [*FORMS, "additive"]), (1.0, 0.5, -2.0)
    fused = fuse(adapters, strengths=strengths, method="sum").deltas()
    parts = [adapter.deltas() for adapter in adapters]
    for key, delta in fused.items():
        exact = sum(w * part[key].up.double() @ part[key].down.double().T for w, part in zip(strengths, parts, strict=True))
        assert delta.rank == 4 + 2 + 4
        assert relative(delta.dense(), exact) < EXACT


@pytest.mark.parametrize("which", BASES)
def test_base_plus_fused_is_one_svd_with_all_bands_plugged_in(which: str, tiny_base_folder: Path) -> None:
    base = shared_base(which, tiny_base_folder)
    adapters = on_bands_of_their_own(base, ["additive"] * 3)
    fused, layers = fuse(adapters, method="sum").deltas(), adaptable_layers(base)
    for key in list(fused)[:: len(fused) // 8]:
        weight = layers[key].weight.double()
        rest, changed = weight.clone(), torch.zeros_like(weight)
        for adapter in adapters:
            part = adapter.concepts[0].layers[key]
            U, s, V = part.band.U.double(), part.band.s.double(), part.band.V.double()
            A, B, c = (part.tensors[name].double() for name in ("A", "B", "c"))
            rest -= U @ torch.diag(s) @ V.T
            changed += (U + A) @ torch.diag(s + c) @ (V + B).T
        assert relative(weight + fused[key].dense().double(), rest + changed) < EXACT


def test_the_order_of_adapters_does_not_matter(base: Base) -> None:
    adapters = on_bands_of_their_own(base, ["additive", "rotational", "additive"], measured=True)
    key = adapters[0].layer_keys()[-1]
    for method in ("sum", "aligned"):
        dense = [fuse(order, method=method).delta(key).dense() for order in permutations(adapters)]
        assert max(relative(other, dense[0]) for other in dense[1:]) < EXACT


def test_what_was_measured_joins_linear_layers_and_convolutions_are_summed(base: Base) -> None:
    endings = ("attn2.to_q", "conv1")
    one, two = (
        random_adapter(base, token=f"<V{number}>", start=2 * number, seed=number, measured=True, endings=endings)
        for number in (1, 2)
    )
    plain = fuse([one, two], method="sum")
    for method in ("aligned", "regmean", "ssr"):
        joined = fuse([one, two], method=method)
        for key in joined.layer_keys():
            apart = relative(joined.delta(key).dense(), plain.delta(key).dense())
            assert apart == 0 if key.endswith("conv1") else apart > 1e-3


def test_fusing_what_is_fused_is_fusing_all_at_once(base: Base) -> None:
    one, two, three = on_bands_of_their_own(base, ["additive"] * 3)
    nested = fuse([fuse([one, two], strengths=[0.5, 1.0], method="sum"), three], strengths=[2.0, 1.0], method="sum")
    assert nested.tokens == ("<V1>", "<V2>", "<V3>") and nested.weights == (1.0, 2.0, 1.0)


def test_strengths_scale_the_deltas(base: Base) -> None:
    one, two = on_bands_of_their_own(base, ["additive"] * 2)
    key = one.layer_keys()[0]
    fused = fuse([one, two], strengths=[3.0, 0.0], method="sum")
    assert relative(fused.delta(key).dense(), 3 * one.delta(key).dense()) < EXACT
    assert relative(fused.scaled(0.5).delta(key).dense(), 1.5 * one.delta(key).dense()) < EXACT
    with pytest.raises(AdapterError, match="2 adapters need as many strengths, got 1"):
        fuse([one, two], strengths=[1.0])
    with pytest.raises(AdapterError, match="Strengths must be numbers, got nan"):
        one.scaled(float("nan"))


@pytest.mark.parametrize("method", FUSERS)
@pytest.mark.parametrize("forms", [("additive", "rotational"), ("lora", "additive")], ids=" ".join)
def test_every_method_joins_concepts_of_any_parametrisation(method: str, forms: tuple[str, str], base: Base) -> None:
    adapters = on_bands_of_their_own(base, forms, measured=True)
    deltas = fuse(adapters, strengths=[1.0, -0.5], method=method).deltas()
    assert deltas.keys() == adapters[0].deltas().keys()
    assert all(torch.isfinite(delta.up).all() and 0 < delta.rank <= 8 for delta in deltas.values())


def test_the_average_divides_by_the_number_of_concepts_in_every_layer(base: Base) -> None:
    one, two, three = (random_adapter(base, token=f"<V{n}>", start=2 * n, seed=n) for n in range(3))
    key, other = one.layer_keys()[:2]
    (part,) = two.concepts
    two = replace(two, concepts=(replace(part, layers={name: own for name, own in part.layers.items() if name != key}),))
    for adapters in ([one, two], [one, two, three]):
        fused = fuse(adapters, method="average")
        for layer in (key, other):
            expected = sum(adapter.delta(layer).dense() for adapter in adapters if layer in adapter.layer_keys()) / len(adapters)
            torch.testing.assert_close(fused.delta(layer).dense(), expected)


def test_a_layer_that_a_method_cannot_join_is_named(base: Base) -> None:
    adapters = on_bands_of_their_own(base, ["additive"] * 2, measured=True)
    key = adapters[0].layer_keys()[0]
    dead = [
        replace(adapter, concepts=(replace(concept, activations=concept.activations | {input_group(key): torch.zeros(48, 4)}),))
        for adapter in adapters
        for concept in adapter.concepts
    ]
    with pytest.raises(AdapterError, match=rf"Layer '{key}' cannot be joined by 'regmean': .* singular; fuse with 'sum'"):
        fuse(dead, method="regmean")


@pytest.mark.parametrize("method", FUSERS)
def test_only_one_concept_of_a_fused_adapter_is_as_never_fused(method: str, base: Base) -> None:
    adapters = on_bands_of_their_own(base, ["additive", "rotational"], measured=True)
    fused = fuse(adapters, method=method)
    for adapter in adapters:
        (token,) = adapter.tokens
        alone = fused.only([token])
        assert alone.tokens == (token,)
        assert all(torch.equal(alone.delta(key).dense(), delta.dense()) for key, delta in adapter.deltas().items())
    assert fused.only(fused.tokens).deltas().keys() == fused.deltas().keys()


def test_concepts_trained_among_one_another_are_summed(base: Base) -> None:
    def trained(adapter: Adapter, *others: str) -> Adapter:
        return replace(adapter, concepts=(replace(adapter.concepts[0], settings={"among": list(others)}),))

    one, two, three = on_bands_of_their_own(base, ["additive"] * 3, measured=True)
    pair = fuse([trained(one, "<V2>"), trained(two, "<V1>", "<V3>")])
    assert pair.method == "sum" and fuse([pair, trained(three, "<V1>", "<V2>")]).method == "aligned"  # <V1> not among <V3>
    assert fuse([one, trained(two, "<V1>")]).method == "aligned"
    assert fuse([pair], method="aligned").method == "aligned"


def test_the_aligned_sum_needs_measured_activations(base: Base) -> None:
    one, two = on_bands_of_their_own(base, ["additive"] * 2, measured=True)
    aligned, plain = fuse([one, two]), fuse([one, two], method="sum")
    assert aligned.method == "aligned"
    for key, delta in aligned.deltas().items():
        assert delta.rank == plain.delta(key).rank
    assert relative(aligned.delta(key).dense(), plain.delta(key).dense()) > 0.01
    unmeasured = replace(two, concepts=(replace(two.concepts[0], activations={}),))
    with pytest.raises(
        AdapterError, match=r"'<V2>' carries no measured activations, which the method 'aligned' needs; fuse .*'sum'"
    ):
        fuse([one, unmeasured])
    with pytest.raises(AdapterError, match="'mean' is not a way to join concepts; choose one of sum, aligned, average"):
        fuse([one, two], method="mean")


def test_overlapping_bands_are_refused_by_name_unless_allowed(base: Base) -> None:
    one, two = random_adapter(base, start=2), random_adapter(base, token="<V2>", start=3)
    with pytest.raises(BandError, match=r"'<V1>' \(directions 2-3\) and '<V2>' \(directions 3-4\) .*--avoid"):
        fuse([one, two], method="sum")
    assert fuse([one, two], method="sum", allow_overlap=True).tokens == ("<V1>", "<V2>")


def test_one_token_twice_is_refused_in_any_case(base: Base) -> None:
    one, two = random_adapter(base), random_adapter(base, token="<v1>", start=2)
    with pytest.raises(AdapterError, match="Two concepts use the token '<V1>'"):
        fuse([one, two], method="sum")
    with pytest.raises(AdapterError, match="give each adapter once"):
        fuse([one, one], method="sum")


def test_bases_must_be_of_one_family(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    one, two = on_bands_of_their_own(base, ["additive"] * 2)
    with pytest.raises(AdapterError, match=r"'<V1>' was trained on a base of family 'mini', '<V2>' on one .*'sd2'"):
        fuse([one, replace(two, family="sd2")], method="sum")
    with caplog.at_level(logging.WARNING):
        fuse([one, replace(two, fingerprint="0" * 16)], method="sum")
    assert "'<V1>' and '<V2>' were trained on different bases" in caplog.text
    caplog.clear()
    imported = replace(two, fingerprint="", prediction_type="")
    (three,) = (adapter for adapter in on_bands_of_their_own(base, ["additive"] * 3) if adapter.tokens == ("<V3>",))
    fuse([imported, one, replace(three, fingerprint="0" * 16, prediction_type="v_prediction")], method="sum")
    assert "'<V1>' and '<V3>' were trained on different bases" in caplog.text
    assert "'<V1>' was trained on a base that predicts epsilon, '<V3>' on one that predicts v_prediction" in caplog.text
    with pytest.raises(AdapterError, match="nothing to fuse"):
        fuse([])
