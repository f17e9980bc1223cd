"""The rival parametrisations, each through the trainer: what moves, what comes out, and how much is trained."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from apple import OnApple
from short_trainings import BAND, SHORT, assert_bit_equal, first_step
from torch import nn

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.adapter_file import load_adapter, save_adapter
from spectral_diffusion.adapters.attach import attached
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base, adaptable_layers, load_base
from spectral_diffusion.concepts.concept import Concept
from spectral_diffusion.errors import BandError, InputError
from spectral_diffusion.parametrisations import PARAMETRISATIONS, RIVALS, SPECTRAL, TUNERS
from spectral_diffusion.parametrisations.budget import parameter_count, rank_for
from spectral_diffusion.parametrisations.site import Site
from spectral_diffusion.prompts.conditioning import prompts
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.training import TrainingSettings, train, train_together
from spectral_diffusion.training.adaptation import adapt
from spectral_diffusion.training.memory import in_bfloat16
from spectral_diffusion.training.trainable import build_trainable, class_word_vectors
from spectral_diffusion.training.tuners import tuned_layers

OTHERS = (*RIVALS, *TUNERS)
DENSE = ("svdiff", "dora", "oft")
pytestmark = pytest.mark.usefixtures("less_preparation")


def settings_of(form: str, steps: int = 4) -> TrainingSettings:
    return replace(SHORT, parametrisation=form, steps=steps)


@pytest.fixture(scope="module")
def adapters(base: Base, concept: Concept) -> dict[str, Adapter]:
    """One adapter per rival."""
    return {form: train(base, concept, BAND, settings_of(form)).adapter for form in OTHERS}


def text_states(base: Base) -> torch.Tensor:
    with torch.no_grad():
        return prompts(base, ["a dog near a lake"])["prompt_embeds"]


@pytest.mark.parametrize("form", PARAMETRISATIONS)
def test_nothing_changes_at_the_start_and_the_count_is_right(form: str, base: Base) -> None:
    before, parameters = text_states(base), [tensor.clone() for tensor in base.pipeline.unet.parameters()]
    trainable = build_trainable(base, ["<V1>"], [BAND], [class_word_vectors(base, "dog")], settings_of(form))
    trainable.adaptation.show(torch.float32)
    with trainable.adaptation.attached():
        torch.testing.assert_close(text_states(base), before, rtol=0, atol=1e-5)  # DoRA divides by norms that it took itself
    assert torch.equal(text_states(base), before)
    assert all(torch.equal(one, other) for one, other in zip(base.pipeline.unet.parameters(), parameters, strict=True))
    shapes = [tuple(layer.weight.shape) for layer in adaptable_layers(base).values()]
    tokens = sum(vectors.numel() for vectors in trainable.embeddings[0].values())
    assert trainable.parameter_count() - tokens == parameter_count(form, shapes, BAND.rank)


@pytest.mark.parametrize("form", OTHERS)
def test_what_was_trained_is_kept_thinly_or_says_that_it_is_dense(
    form: str, adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    (part,) = adapters[form].concepts
    assert part.parametrisation == ("dense" if form in DENSE else "lora")
    assert part.settings["parametrisation"] == form and part.parameters() == part.settings["parameters"]
    assert (part.band is not None) == (form == "orthogonal")
    changed = [part.delta(key).dense().norm() > 0 for key in part.layers]
    assert any(changed) if form == "adalora" else all(changed)  # AdaLoRA may take the whole budget from a layer
    save_adapter(adapters[form], tmp_path / "a.safetensors")
    again = load_adapter(tmp_path / "a.safetensors")
    key = next(iter(part.layers))
    torch.testing.assert_close(again.delta(key).dense(), part.delta(key).dense(), rtol=1e-2, atol=1e-4)  # half precision
    assert again.concepts[0].band == part.band


@pytest.mark.parametrize("form", OTHERS)
def test_the_adapter_does_what_was_trained(form: str, concept: Concept, tiny_base_folder: Path) -> None:
    base = load_base(tiny_base_folder, device="cpu")
    trainable = build_trainable(base, ["<V1>"], [BAND], [class_word_vectors(base, "dog")], settings_of(form))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in trainable.adaptation.named().values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    with trainable.adaptation.attached():
        expected = text_states(base)
    assert not torch.allclose(expected, text_states(base), atol=1e-3)
    trained = trainable.adaptation.result(0)
    (part,) = train(base, concept, BAND, settings_of(form, steps=2)).adapter.concepts
    part = replace(part, parametrisation=trained.form, layers=trained.parts)
    adapter = Adapter(family=base.family, fingerprint=base.fingerprint, concepts=(part,), weights=(1.0,))
    with attached(base, adapter):
        torch.testing.assert_close(text_states(base), expected, rtol=0, atol=2e-5)


def test_a_stopped_adalora_goes_on_where_it_was(base: Base, concept: Concept, tmp_path: Path) -> None:
    settings, file, steps = settings_of("adalora", steps=5), tmp_path / "c", []
    undisturbed = train(base, concept, BAND, settings).adapter
    stopped = train(base, concept, BAND, settings, checkpoint=file, on_progress=steps.append, should_stop=lambda: len(steps) > 2)
    assert not stopped.finished and stopped.steps_done == 3
    assert_bit_equal(train(base, concept, BAND, settings, checkpoint=file).adapter, undisturbed)


def test_adalora_recalls_where_it_is_trained() -> None:
    tuned = tuned_layers("adalora", {"unet.one": nn.Linear(8, 8)}, rank=2, steps=10, seed=0)
    tuned.tuner.to("meta")
    tuned.recall({"ipt": {"lora_A": torch.zeros(8)}, "rank_pattern": {}})
    assert tuned.tuner.rankallocator.ipt["lora_A"].device.type == "meta"


def test_a_change_on_apples_gpu_is_kept() -> None:
    layer = nn.Linear(8, 8)
    tuned = tuned_layers("dora", {"unet.one": layer}, rank=2, steps=2, seed=0)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(OnApple), requires_grad=False)
    tuned.wrapped("unet.one").base_layer.weight = layer.weight
    assert torch.isfinite(tuned.deltas()["unet.one"].dense()).all()


def test_adalora_bears_layers_that_nothing_reads(loaded_bases: dict[str, Base], concept: Concept) -> None:
    """SDXL reads its first text encoder before the last layer, which so gets no gradient."""
    assert train(loaded_bases["sdxl"], concept, BAND, settings_of("adalora")).finished


def test_adalora_moves_its_budget_and_keeps_its_vectors_orthogonal(base: Base) -> None:
    layers = dict(list(adaptable_layers(base).items())[:4])
    tuned = tuned_layers("adalora", layers, rank=2, steps=10, seed=0)
    assert tuned.penalty() > 0
    tensors = [tensor for own in tuned.tensors().values() for tensor in own.values()]
    for step in range(1, 11):
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(step))
            tensor.data.add_(tensor.grad, alpha=0.01)
        tuned.after_step(step)
    kept = sum(int((tuned.wrapped(key).lora_E["default"] != 0).sum()) for key in layers)
    assert kept == 2 * len(layers) < 3 * len(layers)


@pytest.mark.parametrize("form", ["lora", "adalora"])
def test_concepts_of_one_seed_that_are_trained_apart_read_other_things(
    form: str, base: Base, concept: Concept, adapters: dict[str, Adapter]
) -> None:
    other = train(base, replace(concept, token="<V2>"), BAND, settings_of(form)).adapter
    key = next(key for key in other.layer_keys() if key.startswith("unet"))
    one, two = (adapter.delta(key).dense().double() for adapter in (adapters[form], other))
    assert torch.linalg.matrix_norm(one @ two.T) < 0.7 * torch.linalg.matrix_norm(one) * torch.linalg.matrix_norm(two)


def test_orthogonal_concepts_read_orthogonal_inputs(base: Base, concept: Concept, adapters: dict[str, Adapter]) -> None:
    other = replace(concept, token="<V2>")
    second = train(base, other, Band(start=4, rank=2), replace(settings_of("orthogonal"), seed=5)).adapter
    for key in second.layer_keys():
        one, two = adapters["orthogonal"].delta(key).dense(), second.delta(key).dense()
        assert (one @ two.T).norm() < 1e-5 * one.norm() * two.norm()
    assert fuse([adapters["orthogonal"], second], method="sum").tokens == ("<V1>", "<V2>")
    with pytest.raises(BandError, match="share singular directions"):
        fuse([adapters["orthogonal"], replace(second, concepts=(replace(second.concepts[0], band=BAND),))], method="sum")
    with pytest.raises(BandError, match="lies beyond layer"):
        train(base, other, Band(start=63, rank=2), settings_of("orthogonal"))


def test_svdiff_never_turns_a_singular_value_negative() -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    beginning = RIVALS["svdiff"].begin(Site(key="k", weight=weight, band=BAND, seed=0))
    up, down = beginning.factors({"c": torch.full((5,), -100.0)})
    assert (weight + up @ down.T).norm() < 1e-5


def test_what_a_rival_cannot_do_is_refused(base: Base, concept: Concept) -> None:
    pair = [(concept, BAND), (replace(concept, token="<V2>"), BAND)]
    with pytest.raises(InputError, match="'dora' trains one concept at a time, got 2; train them one after the other"):
        train_together(base, pair, settings_of("dora"))
    with pytest.raises(InputError, match=r"dora is for linear layers, '.*conv1' is a convolution; choose others as layers"):
        first_step(base, concept, replace(settings_of("dora"), layers=("to_q", "conv1")))
    with pytest.raises(InputError, match="adalora needs steps to move its budget, got 1; give 2 or more"):
        first_step(base, concept, settings_of("adalora", steps=1))
    with pytest.raises(InputError, match="block size of 2 or more that divides the width of every layer, got 5"):
        first_step(base, concept, replace(settings_of("oft"), rank=5))


def test_ranks_for_one_budget() -> None:
    shapes = [(320, 320)] * 96 + [(320, 768)] * 32 + [(768, 768)] * 48
    budget = parameter_count("lora", shapes, 4)
    for form in PARAMETRISATIONS:
        count = parameter_count(form, shapes, rank_for(form, shapes, budget))
        assert form in ("svdiff", "oft") or 0.75 < count / budget < 1.33, form
    # the paper's figures for SD1.5's 48 + 128 layers
    text, cross = [(768, 768)] * 48, [(320, 768), (640, 768), (1280, 768)]
    assert parameter_count("rotational", text, 8) == 48 * 136
    assert parameter_count("svdiff", cross, 1) == 320 + 640 + 768
    with pytest.raises(InputError, match="there is none"):
        rank_for("oft", [(5, 5), (7, 7)], 100)


def test_every_parametrisation_has_one_place() -> None:
    assert set(PARAMETRISATIONS) == {*SPECTRAL, *RIVALS, *TUNERS} and len(set(PARAMETRISATIONS)) == len(PARAMETRISATIONS)


@pytest.mark.parametrize("form", RIVALS)
def test_several_concepts_stand_side_by_side(form: str) -> None:
    layers = {"unet.one": nn.Linear(12, 16, bias=False), "unet.two": nn.Linear(16, 12, bias=False)}
    bands = [Band(start=0, rank=2), Band(start=2, rank=2)]
    adaptation = adapt(layers, {}, ["<V1>", "<V2>"], bands, TrainingSettings(parametrisation=form, rank=2))
    starts = {name: tensor.detach().clone() for name, tensor in adaptation.named().items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adaptation.named().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator))
    if form == "lora":  # both concepts would read the same otherwise
        assert not torch.equal(starts["unet.one/0/down"], starts["unet.one/1/down"])
    values = torch.randn(2, 3, 12, generator=generator)
    plain = layers["unet.one"](values)
    kept = [adaptation.result(number).parts["unet.one"].tensors for number in range(2)]
    changes = [own["matrix"] if "matrix" in own else own["up"] @ own["down"].T for own in kept]
    assert (changes[0] - changes[1]).norm() > 0.1
    with adaptation.attached():
        for shown, expected in (
            ({}, [changes[0], changes[1]]),
            ({"company": torch.ones(2, 2)}, [changes[0] + changes[1]] * 2),
            ({"company": torch.tensor([[1.0, 0.0], [1.0, 1.0]])}, [changes[0], changes[0] + changes[1]]),
            ({"concept": 1}, [changes[1]] * 2),
        ):
            adaptation.show(torch.float32, **shown)
            found = layers["unet.one"](values) - plain
            wanted = torch.stack([own @ change.T for own, change in zip(values, expected, strict=True)])
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    adaptation.show(torch.float32)
    with adaptation.attached():
        layers["unet.one"](values)[0].sum().backward()
    assert any(gradient.any() for gradient in adaptation.gradients(0))
    assert not any(gradient.any() for gradient in adaptation.gradients(1))


@pytest.mark.parametrize("form", TUNERS)
def test_a_base_in_half_precision_is_trained_as_a_whole_one_is(form: str, base: Base, tiny_base_folder: Path) -> None:
    half = load_base(tiny_base_folder, device="cpu", precision=torch.float16)
    weights = {key: layer.weight.clone() for key, layer in adaptable_layers(half).items()}
    computing = in_bfloat16(half.pipeline.unet, *half.text_encoders.values())  # as on a GPU
    one, other = _changed(form, base, nullcontext()), _changed(form, half, computing)
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.95
    assert all(torch.equal(layer.weight, weights[key]) for key, layer in adaptable_layers(half).items())


def _changed(form: str, base: Base, computing: AbstractContextManager[None]) -> torch.Tensor:
    """Return what a few steps towards other text states changed in every layer, in one row."""
    adaptation = build_trainable(
        base, ["<V1>"], [BAND], [class_word_vectors(base, "dog")], settings_of(form, steps=12)
    ).adaptation
    tensors = [tensor for name, tensor in adaptation.named().items() if name.startswith("text_encoder")]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    optimizer = torch.optim.Adam(tensors, lr=5e-3)
    with computing, adaptation.attached():
        for _ in range(6):
            optimizer.zero_grad()
            states = prompts(base, ["a dog near a lake"])["prompt_embeds"].float()
            ((states - torch.randn(states.shape, generator=torch.Generator().manual_seed(0))) ** 2).mean().backward()
            optimizer.step()
    return torch.cat([delta.dense().flatten() for delta in adaptation.tuner.deltas().values()])
