"""What can be chosen about a training: what is out of range is named, and presets suit base, company and form."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from spectral_diffusion.bases.base import Base
from spectral_diffusion.errors import InputError
from spectral_diffusion.training import PRESETS, TrainingSettings, preset
from spectral_diffusion.training.settings import LARGEST_SEED, SEED_STRIDE


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parametrisation": "lokr"}, "'lokr' is unknown; choose one of additive, rotational, lora"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch": -1}, "batch must be at least 1"),
        ({"token_vectors": 0}, "token_vectors must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"unet_rate": -1e-4}, "unet_rate must not be negative"),
        ({"token_rate": math.nan}, "token_rate must not be negative, got nan"),
        ({"token_norm": -1.0}, "token_norm must not be negative"),
        ({"caption_dropout": 1.5}, "caption_dropout must be from 0 to 1, got 1.5"),
        ({"scenes": 2.0}, "scenes must be from 0 to 1, got 2.0"),
        ({"background": -0.1}, "background must not be negative"),
        ({"gradient_norm": 0.0}, "gradient_norm must be above 0, got 0.0"),
        ({"gradient_norm": math.nan}, "gradient_norm must be above 0, got nan"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number, got inf"),
        ({"seed": -1}, "seed must be from 0 to [0-9]+, got -1"),
        ({"seed": LARGEST_SEED + 1}, f"seed must be from 0 to {LARGEST_SEED}, got"),
        (
            {"layers": ("to_q", "text_projection")},
            "layers names text_projection, whose change no other tool reads; choose others",
        ),
    ],
)
def test_a_setting_out_of_range_is_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainingSettings(**wrong)


def test_the_largest_seed_draws_in_every_step() -> None:
    generator = torch.Generator().manual_seed(LARGEST_SEED * SEED_STRIDE + SEED_STRIDE - 1)
    assert torch.rand(1, generator=generator).isfinite()


def test_presets_are_chosen_by_name_and_take_longer_in_turn(base: Base) -> None:
    for family in (base, replace(base, family="sd1")):
        steps = [preset(name, family).steps for name in PRESETS]
        assert steps == sorted(set(steps))
    real = replace(base, family="sd1")
    assert [preset("balanced", one, concepts=2).isolation for one in (base, real)] == [0, preset("balanced", real).isolation]
    assert [preset("balanced", base, concepts=concepts).token_distance > 0 for concepts in (1, 2)] == [True, False]
    assert [preset("balanced", base, concepts=concepts).scenes > 0 for concepts in (1, 2)] == [True, False]
    assert [preset("balanced", base, concepts=concepts).inertness for concepts in (1, 2)] == [2, 0.5]
    assert [preset("balanced", base, concepts=concepts).unet_rate for concepts in (1, 2, 3)] == [3e-3, 3e-3, 1.5e-3]
    for changes in ({"parametrisation": "lora"}, {"steps": 400}):
        assert preset("balanced", base, concepts=3, changes=changes).unet_rate == 3e-3
    assert [preset("balanced", one).weakest_first for one in (base, real)] == [True, False]
    forms = [preset("balanced", base, changes={"parametrisation": form}) for form in ("additive", "lora", "dora")]
    assert ["conv1" in form.layers for form in forms] == [True, True, False]
    assert "conv1" not in preset("balanced", real).layers
    turned = preset("balanced", base, changes={"parametrisation": "rotational", "unet_rate": 1e-3})
    assert (turned.weakest_first, turned.unet_rate, turned.text_encoder_rate) == (False, 1e-3, 3e-3)
    with pytest.raises(InputError, match="no preset 'quick'; choose one of fast, balanced, best"):
        preset("quick", base)
