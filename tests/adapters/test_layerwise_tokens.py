"""Tokens with vectors of their own for every cross-attention layer: each layer reads its own, everything else is as before."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from commands import Commands
from drawn_pictures import difference
from narrow_bases import FAMILIES
from random_adapters import random_adapter
from safetensors.torch import load_file
from short_trainings import BAND, SHORT, assert_bit_equal, prepare_less

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.adapter_file import load_adapter, save_adapter
from spectral_diffusion.adapters.attach import with_tokens
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base
from spectral_diffusion.bases.cross_attention import cross_attention_layers, own_states
from spectral_diffusion.concepts.concept import Concept
from spectral_diffusion.errors import AdapterError
from spectral_diffusion.export import export_embeddings, remarks
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.generation.regions import Region, suggest_regions
from spectral_diffusion.prompts.conditioning import encode, encode_prompts, tokenize
from spectral_diffusion.training import train


def layerwise(adapter: Adapter, base: Base, spread: float, seed: int = 0) -> Adapter:
    """Return `adapter` with its token's vectors moved at random by `spread`, otherwise in every layer."""
    layers = len(cross_attention_layers(base.pipeline.unet))
    generator = torch.Generator().manual_seed(seed)
    (concept,) = adapter.concepts
    vectors = {
        part: own + spread * torch.randn(layers, *own.shape, generator=generator) for part, own in concept.embeddings.items()
    }
    return replace(adapter, concepts=(replace(concept, embeddings=vectors),))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_layer_reads_the_prompt_with_its_own_vectors(family: str, loaded_bases: dict[str, Base]) -> None:
    base = loaded_bases[family]
    layers = cross_attention_layers(base.pipeline.unet)
    token = layerwise(random_adapter(base, vectors=2), base, 0.1).embeddings["<V1>"]
    other = random_adapter(base, token="<V2>").embeddings["<V2>"]
    read: dict[str, torch.Tensor] = {}

    def note(name: str, layer: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        return layer.to_k.register_forward_pre_hook(lambda module, inputs: read.setdefault(name, inputs[0]))

    with with_tokens(base, {"<V1>": token, "<V2>": other}):
        ids = tokenize(base, ["<V1> <V1>_1 and <V2>", "a dog"])
        handles = [note(name, layer) for name, layer in layers.items()]
        conditioning = encode(base, ids)
        noisy = torch.randn(2, base.pipeline.unet.config.in_channels, 8, 8)
        base.pipeline.unet(noisy, torch.tensor([10, 20]), **conditioning)
        for handle in handles:
            handle.remove()
    for number, name in list(enumerate(layers))[:: len(layers) // 4]:
        with with_tokens(base, {"<V1>": {part: own[number] for part, own in token.items()}, "<V2>": other}):
            torch.testing.assert_close(read[name], encode(base, ids)["encoder_hidden_states"], rtol=1e-4, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in base.pipeline.unet.modules())


def test_vectors_that_are_alike_in_all_layers_draw_what_shared_ones_draw(base: Base) -> None:
    shared = random_adapter(base, vectors=2)
    alike = layerwise(shared, base, 0.0)
    for drawing in (
        Drawing(prompt="(<V1>:1.3) near a lake BREAK snow", steps=3),
        Drawing(prompt="a lake", steps=3, regions=(Region(prompt="<V1>", box=(0.0, 0.0, 0.5, 1.0)),)),
    ):
        (one,), (other,) = generate(base, drawing, shared), generate(base, drawing, alike)
        assert difference(one, other) <= 1
        (own,) = generate(base, drawing, layerwise(shared, base, 0.5))
        assert difference(one, own) > 1


def test_a_region_over_the_whole_picture_is_the_plain_prompt(base: Base) -> None:
    adapter = layerwise(random_adapter(base), base, 0.5)
    plain = Drawing(prompt="<V1> near a lake", steps=3)
    regional = replace(plain, regions=suggest_regions(plain.prompt, adapter.class_words), confined=False)
    (one,), (other,) = generate(base, plain, adapter), generate(base, regional, adapter)
    assert difference(one, other) <= 1


@torch.no_grad()
def test_a_weight_counts_in_every_layer(base: Base) -> None:
    token = layerwise(random_adapter(base), base, 0.5).embeddings["<V1>"]
    with with_tokens(base, {"<V1>": token}):
        (weighed,), (plain,), (empty,) = (
            encode_prompts(base, [text], {"<V1>": "<V1>"})["encoder_hidden_states"] for text in ("a (<V1>:2)", "a <V1>", "")
        )
    width = plain.shape[1] // len(cross_attention_layers(base.pipeline.unet))
    for own, before, nothing in zip(weighed.split(width, 1), plain.split(width, 1), empty.split(width, 1), strict=True):
        torch.testing.assert_close(own[2], 2 * before[2] - nothing[2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own[1], before[1])


@torch.no_grad()
def test_the_pipeline_by_itself_reads_the_mean(base: Base) -> None:
    adapter = layerwise(random_adapter(base), base, 0.5)
    drawn = []
    for vectors in (adapter.concepts[0].embeddings, adapter.concepts[0].shared_embeddings):
        with with_tokens(base, {"<V1>": vectors}):
            seeded = torch.Generator().manual_seed(0)
            drawn.append(base.pipeline(["<V1>"], num_inference_steps=2, height=32, width=32, generator=seeded).images[0])
    assert drawn[0].tobytes() == drawn[1].tobytes()


def test_training_moves_every_layer_by_itself(base: Base, concept: Concept, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_less(monkeypatch)
    settings = replace(SHORT, layerwise_token=True, token_vectors=2, token_norm=0.0)
    adapter = train(base, concept, BAND, settings).adapter
    vectors = adapter.concepts[0].embeddings["text_encoder"]
    layers = cross_attention_layers(base.pipeline.unet)
    assert vectors.shape == (len(layers), 2, 48) and adapter.concepts[0].token_vectors == 2
    assert all((one - other).abs().max() > 1e-4 for one, other in pairwise(vectors))
    longer = train(base, concept, BAND, settings, start=adapter).adapter
    assert not torch.equal(longer.concepts[0].embeddings["text_encoder"], vectors)
    with pytest.raises(AdapterError, match="trained with layerwise_token True, not False"):
        train(base, concept, BAND, replace(settings, layerwise_token=False), start=adapter)


def test_a_file_keeps_them_and_an_export_holds_their_mean(base: Base, tmp_path: Path, run: Commands) -> None:
    adapter = layerwise(random_adapter(base, vectors=2), base, 0.5)
    save_adapter(adapter, tmp_path / "dog.safetensors")
    again = load_adapter(tmp_path / "dog.safetensors")
    assert torch.equal(again.concepts[0].embeddings["text_encoder"], adapter.concepts[0].embeddings["text_encoder"])
    made = export_embeddings(again, tmp_path / "out", dtype=torch.float32)
    mean = load_file(made.embeddings["<V1>"])["emb_params"]
    torch.testing.assert_close(mean, adapter.concepts[0].embeddings["text_encoder"].mean(0))
    assert any("<V1>: no other tool holds vectors for each cross-attention layer" in line for line in remarks(again))
    said = run("export", tmp_path / "dog.safetensors", "--format", "embedding", "--out", tmp_path / "typed")
    assert "no other tool holds vectors for each cross-attention layer" in said
    assert "vectors of its own for every cross-attention layer" in run("info", tmp_path / "dog.safetensors")


def test_a_token_of_another_number_of_layers_is_refused(base: Base) -> None:
    adapter = layerwise(random_adapter(base), base, 0.5)
    few = {part: own[:1] for part, own in adapter.concepts[0].embeddings.items()}
    refusal = pytest.raises(AdapterError, match=r"vectors for 1 cross-attention layers, the base .* has")
    with refusal, with_tokens(base, {"<V1>": few}):
        pass


def test_fused_with_a_concept_of_shared_vectors_each_stays_as_it_is(base: Base) -> None:
    pair = fuse([layerwise(random_adapter(base), base, 0.5), random_adapter(base, token="<V2>", start=2)], method="sum")
    assert_bit_equal(pair.only(["<V1>"]), layerwise(random_adapter(base), base, 0.5))
    drawing = Drawing(prompt="<V1> and <V2>", steps=2)
    (both,), (shared,) = (
        generate(base, drawing, adapter)
        for adapter in (pair, replace(pair, concepts=tuple(replace(c, embeddings=c.shared_embeddings) for c in pair.concepts)))
    )
    assert difference(both, shared) > 1


def test_states_that_are_shared_are_read_whole(base: Base) -> None:
    (layer, *_) = cross_attention_layers(base.pipeline.unet).values()
    states = torch.randn(1, 3, layer.to_k.in_features)
    assert own_states(layer, 3, states) is states
