"""What to draw and what came of it, as plain values: nothing here needs the libraries that draw."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from spectral_diffusion.errors import InputError
from spectral_diffusion.generation.regions import MOST_REGIONS, Region

if TYPE_CHECKING:
    from spectral_diffusion.generation.condition_picture import Condition

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ SDE": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
}
"""Samplers by the names that users know."""
MOST_STEPS = 500
"""Half of the degrees of noise that every base of these families was trained with (`num_train_timesteps`): samplers that leave
out none of them begin far below pure noise, or beyond the last degree."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What to draw and how; `size`, `(width, height)` in pixels, and `guidance` are the base's own when missing, `confined` suits
    how the concepts were trained.

    Attributes:
        regions: parts of the picture with prompts of their own, later ones on top; `prompt` is read everywhere else.
        confined: whether a concept that a region names acts there only, drawn by its own model (see `own_models`); when missing
            it does, unless all that are named learnt from pictures of each other, see `fusion.shown_together`.
        condition: a sketch or pose that the picture follows.

    Raises:
        InputError: a value is out of range; the message names the field.
    """

    prompt: str
    negative_prompt: str = ""
    count: int = 1
    seed: int = 0
    steps: int = 25
    guidance: float | None = None
    scheduler: str = "DDIM"
    size: tuple[int, int] | None = None
    regions: tuple[Region, ...] = ()
    confined: bool | None = None
    condition: Condition | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InputError("The prompt is empty; say what to draw.")
        for name in ("count", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.steps > MOST_STEPS:
            raise InputError(f"steps must be at most {MOST_STEPS}, got {self.steps}.")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise InputError(f"guidance must be a number, got {self.guidance}.")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be a whole number from 0 to {2**63 - 1}, got {self.seed}.")
        if self.scheduler not in SCHEDULERS:
            raise InputError(f"There is no sampler '{self.scheduler}'; choose one of {', '.join(SCHEDULERS)}.")
        if self.size is not None and any(edge < 8 or edge % 8 for edge in self.size):
            raise InputError(f"size must be multiples of 8 pixels, got {self.size[0]} x {self.size[1]}.")
        if len(self.regions) > MOST_REGIONS:
            raise InputError(f"{len(self.regions)} regions do not fit into one picture; give at most {MOST_REGIONS}.")

    @property
    def words(self) -> str:
        """Everything that the picture is drawn from, the regions' prompts included."""
        return "\n".join([self.prompt, *(region.prompt for region in self.regions)])


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawn picture with the seed that draws it again and the settings of its drawing, those that it left open among them."""

    image: Image.Image
    seed: int
    drawing: Drawing
    tokens: tuple[str, ...]
    class_words: dict[str, str]


def random_seed() -> int:
    """Return a seed taken from the clock."""
    return time.time_ns() % 2**31
