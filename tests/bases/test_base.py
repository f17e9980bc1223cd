"""Bases of every family: told apart, adapted, drawn with, and left as they were."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from narrow_bases import FAMILIES, NarrowBase
from random_adapters import assert_same_in_half_precision, random_adapter
from short_trainings import BAND, SHORT, assert_bit_equal

from spectral_diffusion.adapters.adapter import Adapter, input_group
from spectral_diffusion.adapters.adapter_file import load_adapter, save_adapter
from spectral_diffusion.adapters.attach import attached
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base, adaptable_layers, load_base
from spectral_diffusion.concepts.concept import Concept
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.prompts.conditioning import encode, tokenize
from spectral_diffusion.training import train

pytestmark = pytest.mark.usefixtures("less_preparation")

PARTS = {"sd1": ["text_encoder"], "sd2": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_and_a_folder_are_the_same_base(
    family: str, loaded_bases: dict[str, Base], narrow_bases: dict[str, NarrowBase]
) -> None:
    base, folder = loaded_bases[family], load_base(narrow_bases[family].folder, device="cpu")
    assert base.family == folder.family == family
    assert base.fingerprint == folder.fingerprint
    assert list(base.text_encoders) == list(base.tokenizers) == PARTS[family]
    (one,), (other,) = (generate(each, Drawing(prompt="a dog!", steps=2)) for each in (base, folder))
    assert one.image == other.image and np.asarray(one.image).std() > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapted_layers_are_the_attention_of_all_parts(family: str, loaded_bases: dict[str, Base]) -> None:
    keys = adaptable_layers(loaded_bases[family])
    counts = {part: sum(key.startswith(f"{part}.") for key in keys) for part in ("unet", "text_encoder", "text_encoder_2")}
    assert (
        counts
        == {
            "sd1": {"unet": 128, "text_encoder": 48, "text_encoder_2": 0},
            "sd2": {"unet": 128, "text_encoder": 92, "text_encoder_2": 0},
            "sdxl": {"unet": 560, "text_encoder": 48, "text_encoder_2": 128},
        }[family]
    )
    assert not any("text_model" in key for key in keys)


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler])
def test_noise_is_added_as_in_the_training_whatever_the_folders_sampler(
    kind: type, loaded_bases: dict[str, Base], narrow_bases: dict[str, NarrowBase], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(narrow_bases["sdxl"].folder, tmp_path / "folder"))
    shutil.rmtree(folder / "scheduler")
    pipeline = narrow_bases["sdxl"].pipeline
    kind.from_config(pipeline.scheduler.config).save_pretrained(folder / "scheduler")
    index = (folder / "model_index.json").read_text().replace("DDIMScheduler", kind.__name__)
    (folder / "model_index.json").write_text(index)
    clean, noise, times = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    noisy = [
        base.pipeline.scheduler.add_noise(clean, noise, times) for base in (load_base(folder, device="cpu"), loaded_bases["sdxl"])
    ]
    torch.testing.assert_close(*noisy, rtol=0, atol=1e-6)


def test_how_a_folder_likes_to_draw_does_not_go_on_into_other_samplers(
    loaded_bases: dict[str, Base], narrow_bases: dict[str, NarrowBase], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(narrow_bases["sd1"].folder, tmp_path / "folder"))
    shutil.rmtree(folder / "scheduler")
    liking = {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}
    plain = narrow_bases["sd1"].pipeline.scheduler.config
    DPMSolverMultistepScheduler.from_config(plain, **liking).save_pretrained(folder / "scheduler")
    index = (folder / "model_index.json").read_text().replace("DDIMScheduler", "DPMSolverMultistepScheduler")
    (folder / "model_index.json").write_text(index)
    pictures = [
        generate(base, Drawing(prompt="a dog", steps=3, scheduler="DPM++ 2M"))[0].image
        for base in (load_base(folder, device="cpu"), loaded_bases["sd1"])
    ]
    assert pictures[0] == pictures[1]


@torch.no_grad()
def predicted(base: Base, caption: str) -> torch.Tensor:
    """Return what the base predicts for fixed noise and `caption`."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return base.pipeline.unet(latents, 500, **encode(base, tokenize(base, [caption]))).sample


@pytest.mark.parametrize(("family", "form"), [("sd1", "additive"), ("sd2", "rotational"), ("sdxl", "additive")])
def test_an_attached_adapter_is_the_dense_weight_plus_its_delta(
    family: str, form: str, loaded_bases: dict[str, Base], narrow_bases: dict[str, NarrowBase]
) -> None:
    base = loaded_bases[family]
    adapter, bare = random_adapter(base, form, size=0.05, vectors=2), predicted(base, "a dog")
    with attached(base, random_adapter(base, form, size=0.0)):
        assert torch.equal(predicted(base, "a dog"), bare)
    with attached(base, adapter):
        low_rank = predicted(base, "a dog")
    assert torch.equal(predicted(base, "a dog"), bare)
    merged = load_base(narrow_bases[family].folder, device="cpu")
    layers = adaptable_layers(merged)
    for key, delta in adapter.deltas().items():
        layers[key].weight.data += delta.dense()
    assert (low_rank - bare).norm() > 0.01 * bare.norm()
    dense = predicted(merged, "a dog")
    assert (low_rank - dense).norm() / dense.norm() < 1e-4  # float32 round-off through up to 140 attentions


@pytest.fixture(scope="module")
def trained(loaded_bases: dict[str, Base], concept: Concept) -> Callable[[str], Adapter]:
    """Give the adapter of a family after two steps."""
    return cache(lambda family: train(loaded_bases[family], concept, BAND, replace(SHORT, steps=2)).adapter)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_moves_every_part_that_the_unet_reads(
    family: str, trained: Callable[[str], Adapter], loaded_bases: dict[str, Base]
) -> None:
    adapter, base = trained(family), loaded_bases[family]
    (concept,) = adapter.concepts
    assert (adapter.family, adapter.fingerprint, adapter.prediction_type) == (family, base.fingerprint, "epsilon")
    assert list(concept.embeddings) == PARTS[family]
    for part, vectors in concept.embeddings.items():
        dog = base.tokenizers[part]("dog", add_special_tokens=False).input_ids
        assert not torch.equal(vectors, base.text_encoders[part].get_input_embeddings().weight[dog])
    still = {
        key for key, part in concept.layers.items() if not any(torch.count_nonzero(tensor) for tensor in part.tensors.values())
    }
    # SDXL reads the first text encoder before its last layer
    assert {key.rpartition(".self_attn")[0] for key in still} == (
        {"text_encoder.encoder.layers.11"} if family == "sdxl" else set()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_of_all_parts_are_measured(family: str, trained: Callable[[str], Adapter]) -> None:
    (concept,) = trained(family).concepts
    assert concept.activations.keys() == {input_group(key) for key in concept.layers}
    for group, factor in concept.activations.items():
        assert factor.isfinite().all()
        assert 0.5 < factor.square().sum() / len(factor) < 1.001, group  # trace as wide as the input, less what was cut


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_adapter_is_saved_fused_and_drawn(
    family: str, trained: Callable[[str], Adapter], loaded_bases: dict[str, Base], tmp_path: Path
) -> None:
    base, file = loaded_bases[family], tmp_path / "a.safetensors"
    save_adapter(trained(family), file)
    loaded = load_adapter(file)
    assert_same_in_half_precision(loaded, trained(family))
    other = random_adapter(base, token="<V2>", start=4, vectors=1, measured=True)
    for method in ("sum", "aligned"):
        pair = fuse([loaded, other], method=method)
        (bare,) = generate(base, Drawing(prompt="<V1> and <V2>", steps=1))
        (picture,) = generate(base, Drawing(prompt="<V1> and <V2>", steps=1), pair)
        assert picture.image != bare.image


def test_a_stopped_training_of_sdxl_goes_on_where_it_was(
    loaded_bases: dict[str, Base], concept: Concept, trained: Callable[[str], Adapter], tmp_path: Path
) -> None:
    base, settings, state = loaded_bases["sdxl"], replace(SHORT, steps=2), tmp_path / "state"
    seen: list[int] = []
    stopped = train(
        base,
        concept,
        BAND,
        settings,
        checkpoint=state,
        on_progress=lambda event: seen.append(event.step),
        should_stop=lambda: bool(seen),
    )
    assert not stopped.finished
    assert_bit_equal(train(base, concept, BAND, settings, checkpoint=state).adapter, trained("sdxl"))


def test_the_embedded_base_computes_with_one_thread_and_others_with_all(
    narrow_bases: dict[str, NarrowBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectral_diffusion.bases.base._THREADS", 2)
    threads = torch.get_num_threads()
    try:
        load_base(narrow_bases["sd1"].folder, device="cpu")
        assert torch.get_num_threads() == 2
        load_base(device="cpu")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
