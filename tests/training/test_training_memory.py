"""A training fits into the memory there is: the plan it chooses, and that no plan changes what is learnt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from short_trainings import BAND, SHORT, assert_near

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.bases.base import Base
from spectral_diffusion.concepts.concept import Concept
from spectral_diffusion.errors import TrainingError
from spectral_diffusion.training import train
from spectral_diffusion.training.memory import Plan, choose_plan, in_bfloat16, lightened
from spectral_diffusion.training.run import Run

SETTINGS = replace(SHORT, steps=2, batch=2, inert_batch=2)


pytestmark = pytest.mark.usefixtures("less_preparation", "followed_gradients")


@pytest.fixture(scope="module")
def undisturbed(base: Base, concept: Concept) -> Adapter:
    return train(base, concept, BAND, SETTINGS).adapter


@pytest.mark.parametrize(
    ("free", "plan"),
    [
        (100, Plan()),
        (45, Plan(parts=2)),
        (15, Plan(parts=8)),
        (9, Plan(parts=2, checkpointing=True)),
        (0, Plan(parts=8, checkpointing=True)),
    ],
)
def test_the_fastest_plan_that_fits_is_chosen(free: float, plan: Plan) -> None:
    assert choose_plan(free, direct=10, checkpointed=2, samples=8) == plan


@pytest.mark.parametrize("plan", [Plan(parts=3), Plan(parts=4, checkpointing=True)])
def test_no_plan_changes_what_is_learnt(
    plan: Plan, base: Base, concept: Concept, undisturbed: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectral_diffusion.training.run.measured_plan", lambda *anything: plan)
    assert_near(train(base, concept, BAND, SETTINGS).adapter, undisturbed)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in base.pipeline.unet.modules())


def test_when_memory_does_not_suffice_a_smaller_plan_is_tried_once(
    base: Base, concept: Concept, undisturbed: Adapter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_out, kept = [1], Run._losses

    def losses(run: Run, batch: object) -> torch.Tensor:
        found = kept(run, batch)
        if run.step == 1 and run_out:
            run_out.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(Run, "_losses", losses)
    assert_near(train(base, concept, BAND, SETTINGS).adapter, undisturbed)
    assert "Memory did not suffice; the training goes on with each batch in 2 passes, with gradient checkpointing" in caplog.text
    run_out.extend([1, 1])
    with pytest.raises(TrainingError, match=r"does not suffice for each batch in 2 passes, with .* choose a smaller batch"):
        train(base, concept, BAND, SETTINGS)


@pytest.mark.parametrize(("device", "computing"), [("cpu", torch.float32), ("mps", torch.bfloat16), ("cuda", torch.bfloat16)])
def test_only_a_cpu_trains_in_the_precision_of_the_base(
    device: str, computing: torch.dtype, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Base, "device", torch.device(device))
    with lightened(tiny_base):
        assert {model.dtype for model in (tiny_base.pipeline.unet, *tiny_base.text_encoders.values())} == {computing}
    assert tiny_base.pipeline.unet.dtype == torch.float32


@pytest.mark.parametrize("fails", [False, True])
def test_weights_come_back_from_bfloat16_bit_for_bit(fails: bool, tiny_base: Base) -> None:
    unet = tiny_base.pipeline.unet
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    try:
        with in_bfloat16(unet):
            assert {value.dtype for value in unet.state_dict().values()} == {torch.bfloat16}
            latents, states = torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16), torch.zeros(1, 5, 48, dtype=torch.bfloat16)
            assert unet(latents, 5, states).sample.dtype == torch.bfloat16
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    after = unet.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].stride() == after[name].stride() for name in before)
