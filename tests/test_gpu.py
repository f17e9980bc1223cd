"""What runs on a GPU, on a pretended one: everything lies where it is needed, and no training step waits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from narrow_bases import NarrowBase
from pretended_gpu import GPU, WAITS, OnGPU, pretended_gpu
from random_adapters import random_adapter
from short_trainings import BAND, SHORT, trained_tensors

from benchmarks import speed
from benchmarks.whole_training import measure_training
from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base, load_base, read_base
from spectral_diffusion.concepts.concept import Concept, load_concept
from spectral_diffusion.generation.drawing import SCHEDULERS, Drawing
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.generation.regions import suggest_regions
from spectral_diffusion.parametrisations import PARAMETRISATIONS
from spectral_diffusion.reports import fusion_report
from spectral_diffusion.scoring.clip_scorer import load_scorer
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.training import settle, train, train_together
from spectral_diffusion.training.run import READ_EVERY, Run

pytestmark = pytest.mark.usefixtures("less_preparation")
TOGETHER = Drawing(prompt="<V1> and <V2> near a lake", steps=2, seed=1)


@pytest.fixture
def pair(tiny_base: Base) -> Adapter:
    one, other = random_adapter(tiny_base, vectors=2), random_adapter(tiny_base, token="<V2>", start=2, seed=1)
    return fuse([one, other], method="sum")


def concepts(photos: Path) -> list[tuple[Concept, Band]]:
    tokens = zip(("<V1>", "<V2>"), (BAND, Band(start=4, rank=2)), strict=True)
    return [(load_concept(photos, token=token, class_word="dog"), band) for token, band in tokens]


def test_what_lies_elsewhere_is_refused_and_waiting_is_counted(tiny_base: Base) -> None:
    with pretended_gpu(tiny_base):
        far, near = torch.randn(3, 4).to(GPU), torch.randn(4, 3)
        with pytest.raises(RuntimeError, match="same device"):
            far @ near
        with pytest.raises(TypeError, match="numpy"):
            far.numpy()
        layer, before = torch.nn.Linear(4, 2).to("cuda"), WAITS.total()
        loss = layer(far).square().mean() * torch.ones((), device=GPU)
        loss.backward()
        assert layer.weight.grad.device == GPU and WAITS.total() == before
        assert loss.item() > 0 and WAITS.total() == before + 1
        assert type(far.cpu()) is torch.Tensor and WAITS.total() == before + 2
        assert type(near.to(far)) is type(near.to("cuda")) is OnGPU


@pytest.mark.parametrize("confined", [None, False, True])
def test_a_picture_is_the_same(confined: bool | None, base: Base, tiny_base: Base, pair: Adapter) -> None:
    drawing = TOGETHER
    if confined is not None:
        drawing = replace(TOGETHER, regions=suggest_regions(TOGETHER.prompt, pair.class_words), confined=confined)
    (here,) = generate(base, drawing, pair)
    with pretended_gpu(tiny_base):
        (there,) = generate(load_base(precision=torch.float32), drawing, pair)
    np.testing.assert_array_equal(here.image, there.image)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_sampler_draws(scheduler: str, tiny_base: Base, pair: Adapter) -> None:
    with pretended_gpu(tiny_base):
        (picture,) = generate(load_base(), replace(TOGETHER, scheduler=scheduler, steps=3), pair)
    assert np.asarray(picture.image).std() > 1


def test_concepts_are_trained_settled_fused_and_reported(
    tiny_base: Base, photo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion_report, "PROMPTS", fusion_report.PROMPTS[:2])
    settings = replace(SHORT, steps=2, mixing=0.4, scenes=0.4, presence=0.5, sample_every=1)
    with pretended_gpu(tiny_base):
        base = load_base()
        trained = [result.adapter for result in train_together(base, concepts(photo_folder), settings)]
        assert all(type(t) is torch.Tensor and t.isfinite().all() for one in trained for t in trained_tensors(one).values())
        fused = fuse([result.adapter for result in settle(base, trained, steps=1)], method="aligned")
        report = fusion_report.report_fusion(base, fused, load_scorer(device=GPU), {})
    assert [concept.token for concept in report.concepts] == ["<V1>", "<V2>"]


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_every_family_is_trained_and_drawn(family: str, narrow_bases: dict[str, NarrowBase], concept: Concept) -> None:
    narrow = narrow_bases[family]
    with pretended_gpu(read_base(narrow.file, configuration=narrow.configuration)):
        base = load_base()
        assert base.device == GPU and {base.pipeline.unet.dtype, base.pipeline.vae.dtype} == {torch.float16, torch.float32}
        result = train(base, concept, BAND, replace(SHORT, steps=1))
        (picture,) = generate(base, Drawing(prompt="<V1> near a lake", steps=1, seed=1), result.adapter)
    assert np.asarray(picture.image).std() > 1


@pytest.mark.parametrize("form", PARAMETRISATIONS)
def test_every_form_is_trained_and_goes_on(form: str, tiny_base: Base, concept: Concept, tmp_path: Path) -> None:
    settings, kept = replace(SHORT, steps=2, parametrisation=form, attention=0.1, isolation=0), tmp_path / "checkpoint"
    with pretended_gpu(tiny_base):
        base, events = load_base(), []
        train(base, concept, BAND, settings, checkpoint=kept, on_progress=events.append, should_stop=lambda: bool(events))
        result = train(base, concept, BAND, settings, checkpoint=kept)
        (picture,) = generate(base, Drawing(prompt="<V1> near a lake", steps=1, seed=1), result.adapter)
    assert result.finished and np.asarray(picture.image).std() > 1


def test_what_is_to_be_measured_there_runs(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "kept_bytes", lambda *of: 1)  # it looks where numbers lie
    with pretended_gpu(tiny_base):
        figures = measure_training(load_base(), replace(SHORT, steps=2 * READ_EVERY))
        models = speed.random_models(0.1, GPU, torch.bfloat16)
        steps = speed.measure_steps(models, ("additive", "peft_lora"), 1, 1, 64, again=False, rounds=1, folder=tmp_path)
        drawing = speed.measure_drawing(models, 1, 64, rounds=1)
    assert min(figures["step_seconds"], figures["over_diffusers"], drawing["folded_over_bare"]) > 0
    assert steps["methods"]["additive"]["over_peft"]["peak_bytes"] == 1


def test_no_step_waits(tiny_base: Base, photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Counter[str]] = []
    make_step = Run._one_step

    def watched(run: Run) -> Any:
        before = WAITS.copy()
        read = make_step(run)
        waited.append(WAITS - before)
        return read

    monkeypatch.setattr(Run, "_one_step", watched)
    with pretended_gpu(tiny_base):
        train_together(load_base(), concepts(photo_folder), replace(SHORT, steps=12, mixing=0.4, presence=0.5, isolation=4))
    looked_at = [number for number, step in enumerate(waited, 1) if step]
    assert looked_at == [1, READ_EVERY, 12], waited
