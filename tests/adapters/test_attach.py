"""Attaching: exact while it lasts, and gone without a trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_adapters import FORMS, random_adapter
from shared_bases import BASES, shared_base
from torch import nn

from spectral_diffusion.adapters.adapter import Adapter, token_words
from spectral_diffusion.adapters.attach import Switch, attached, beside, check_fits_base, check_new_tokens, hooked, with_tokens
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base, adaptable_layers, load_base
from spectral_diffusion.bases.layer_names import ATTENTION_LAYERS, CONVOLUTION_LAYERS
from spectral_diffusion.errors import AdapterError, InputError
from spectral_diffusion.prompts.tokens import expand_prompt


def without_tokens(adapter: Adapter, size: int) -> Adapter:
    """Return `adapter` with its vectors replaced by zeros."""
    concepts = tuple(replace(concept, embeddings={"text_encoder": torch.zeros(1, size)}) for concept in adapter.concepts)
    return replace(adapter, concepts=concepts)


@torch.no_grad()
def outputs(base: Base, prompt: str = "a dog near a lake") -> list[torch.Tensor]:
    """Return what the text encoder and the UNet give for fixed inputs."""
    pipeline = base.pipeline
    ids = pipeline.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
    states = pipeline.text_encoder(ids).last_hidden_state
    config = pipeline.unet.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return [states, pipeline.unet(latents, 500, states).sample]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", BASES)
def test_an_untrained_adapter_changes_no_output_bit(which: str, form: str, tiny_base_folder: Path) -> None:
    base = shared_base(which, tiny_base_folder)
    before = outputs(base)
    with attached(base, random_adapter(base, form, size=0.0)):
        assert same(outputs(base), before)


@pytest.mark.parametrize("endings", [ATTENTION_LAYERS, CONVOLUTION_LAYERS], ids=["attention", "convolutions"])
@pytest.mark.parametrize("form", FORMS)
def test_an_attached_adapter_is_the_dense_weight_plus_its_delta(
    form: str, endings: tuple[str, ...], base: Base, tiny_base: Base
) -> None:
    adapter = random_adapter(base, form, endings=endings)
    bare = outputs(base)
    with attached(base, adapter):
        low_rank = outputs(base)
    layers = adaptable_layers(tiny_base, endings)
    for key, delta in adapter.deltas().items():
        layers[key].weight.data += delta.dense().view_as(layers[key].weight)
    dense = outputs(tiny_base)
    for one, other, before in list(zip(low_rank, dense, bare, strict=True))[
        endings == CONVOLUTION_LAYERS :
    ]:  # none in the encoder
        assert (other - before).norm() > 0.01 * before.norm()
        assert (one - other).norm() / other.norm() < 1e-5  # float32 round-off through all layers


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_base_is_bit_for_bit_what_it_was(fails: bool, tiny_base: Base) -> None:
    pipeline = tiny_base.pipeline
    models = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    weights = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    modules = [set(model.modules()) for model in models]
    places = [[parameter.data_ptr() for parameter in model.parameters()] for model in models]
    tokenizer, words, before = pipeline.tokenizer, len(pipeline.tokenizer), outputs(tiny_base, "a <V1>")
    try:
        with attached(tiny_base, random_adapter(tiny_base)):
            assert not same(outputs(tiny_base, "a <V1>"), before)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    for model, kept, parts in zip(models, weights, modules, strict=True):
        state = model.state_dict()
        assert state.keys() == kept.keys() and all(torch.equal(state[name], kept[name]) for name in kept)
        assert set(model.modules()) == parts and not any(part._forward_hooks for part in parts)
    assert [[parameter.data_ptr() for parameter in model.parameters()] for model in models] == places
    assert pipeline.tokenizer is tokenizer and len(tokenizer) == words
    assert same(outputs(tiny_base, "a <V1>"), before)


def test_a_token_stands_for_its_vectors(base: Base) -> None:
    dog = base.pipeline.tokenizer("dog", add_special_tokens=False).input_ids
    vectors = base.pipeline.text_encoder.get_input_embeddings().weight[dog]
    before = outputs(base, "a dog near a lake")
    with with_tokens(base, {"<V1>": {"text_encoder": vectors}}):
        assert torch.equal(base.pipeline.text_encoder.get_input_embeddings().weight[-1:], vectors)
        for prompt in ("a <V1> near a lake", "a <v1> near a lake"):
            assert same(outputs(base, prompt), before)


def test_a_table_with_more_rows_than_there_are_words_is_no_hindrance(tiny_base_folder: Path) -> None:
    """As in a base whose table was padded to a round number of rows."""
    base = load_base(tiny_base_folder, device="cpu")
    holder = base.pipeline.text_encoder.get_input_embeddings()
    padded = nn.Embedding.from_pretrained(torch.cat([holder.weight, torch.zeros(5, holder.embedding_dim)]))
    base.pipeline.text_encoder.set_input_embeddings(padded)
    test_a_token_stands_for_its_vectors(base)


def test_a_token_of_several_vectors_is_written_as_that_many_words(base: Base) -> None:
    vectors = {"<V1>": {"text_encoder": torch.randn(3, 48)}, "<V1>x": {"text_encoder": torch.randn(1, 48)}}
    with with_tokens(base, vectors):
        tokenizer = base.pipeline.tokenizer
        first = tokenizer.convert_tokens_to_ids("<V1>")
        prompt = expand_prompt("<v1> <V1>x", {"<V1>": token_words("<V1>", 3), "<V1>x": "<V1>x"})
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        assert ids == [first, first + 1, first + 2, first + 3]


def test_while_drawing_nothing_is_computed_beside_the_layers(base: Base) -> None:
    adapter = random_adapter(base)
    with attached(base, adapter):
        assert not any(module._forward_hooks for module in base.pipeline.unet.modules())
        folded_in = outputs(base)
    with with_tokens(base, adapter.embeddings), beside(base, adapter):
        hooked = outputs(base)
    for one, other in zip(folded_in, hooked, strict=True):
        assert (one - other).norm() / other.norm() < 1e-5  # float32 round-off through all layers


def test_a_base_in_half_precision_gets_its_own_weights_back(tiny_base: Base) -> None:
    unet = tiny_base.pipeline.unet.half()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with attached(tiny_base, random_adapter(tiny_base)):
        assert {tensor.dtype for tensor in unet.state_dict().values()} == {torch.float16}
        assert not all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())


def test_deltas_can_be_switched_off_for_a_while(base: Base) -> None:
    (layer,) = list(adaptable_layers(base).items())[:1]
    inputs, switch = torch.ones(1, layer[1].in_features), Switch()
    factors = {layer[0]: lambda: (torch.ones(layer[1].out_features, 1), torch.ones(layer[1].in_features, 1))}
    bare = layer[1](inputs)
    with hooked(dict([layer]), factors, switch):
        torch.testing.assert_close(layer[1](inputs), bare + layer[1].in_features, rtol=1e-6, atol=0)
        switch.on = False
        assert torch.equal(layer[1](inputs), bare)


def test_each_share_of_a_batch_goes_through_factors_of_its_own(base: Base) -> None:
    (key, layer), *_ = adaptable_layers(base).items()
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(3, width, 2, generator=generator) for width in (layer.out_features, layer.in_features))
    inputs = torch.randn(6, 5, layer.in_features, generator=generator)
    with hooked({key: layer}, {key: lambda: (up, down)}):
        together = layer(inputs)
    for share in range(3):
        with hooked({key: layer}, {key: lambda share=share: (up[share], down[share])}):
            own = layer(inputs[2 * share : 2 * share + 2])
        # sums of 50 products in float32
        torch.testing.assert_close(together[2 * share : 2 * share + 2], own, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_another_family_is_refused(base: Base) -> None:
    stranger = replace(random_adapter(base), family="sd1")
    with (
        pytest.raises(AdapterError, match=r"belongs to a base of family 'sd1', .* is of family 'mini'"),
        attached(base, stranger),
    ):
        pass


def test_what_was_trained_to_predict_otherwise_is_refused(base: Base) -> None:
    adapter = replace(random_adapter(base), prediction_type="v_prediction")
    with pytest.raises(AdapterError, match=r"where this base predicts v_prediction, .* give --prediction-type v_prediction"):
        check_fits_base(base, adapter)
    check_fits_base(base, replace(adapter, fingerprint="another"))  # of whose prediction nothing is known here


def test_layers_that_do_not_fit_are_named(base: Base) -> None:
    adapter = random_adapter(base)
    (concept,) = adapter.concepts
    key, other = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "text_encoder.encoder.layers.0"
    unknown = replace(concept, layers={"unet.nowhere.to_q": concept.layers[key]})
    with (
        pytest.raises(AdapterError, match=r"has no layer 'unet\.nowhere\.to_q' that '<V1>'"),
        attached(base, replace(adapter, concepts=(unknown,))),
    ):
        pass
    misshapen = replace(concept, layers={key: concept.layers[f"{other}.self_attn.q_proj"]})
    with (
        pytest.raises(AdapterError, match=r"to_q' is \(64, 64\) in .* but \(48, 48\) in '<V1>'"),
        attached(base, replace(adapter, concepts=(misshapen,))),
    ):
        pass
    with (
        pytest.raises(AdapterError, match="embedding of '<V1>' is 7 wide, the base's text encoder 48"),
        attached(base, without_tokens(adapter, 7)),
    ):
        pass
    assert len(base.pipeline.tokenizer) == base.pipeline.text_encoder.config.vocab_size


@pytest.mark.parametrize("token", ["dog", "DOG", "<|endoftext|>"])
def test_a_word_of_the_base_is_no_token(token: str, base: Base) -> None:
    with pytest.raises(InputError, match="is already a word of the base; choose another"):
        check_new_tokens(base, [token])


def test_two_concepts_cannot_share_a_token_or_one_of_its_words(base: Base) -> None:
    one, two = random_adapter(base, vectors=2), random_adapter(base, token="<V1>_1", start=2)
    with pytest.raises(InputError, match="Two concepts use the token '<V1>_1'"), attached(base, fuse([one, two], method="sum")):
        pass
