"""What can differ between the pictures of a comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from spectral_diffusion.adapters.adapter import METHODS
from spectral_diffusion.errors import InputError
from spectral_diffusion.generation.drawing import SCHEDULERS

_CONVERSIONS: dict[str, Callable[[str], object]] = {
    "seed": int,
    "prompt": str,
    "steps": int,
    "guidance": float,
    "sampler": str,
    "strength": float,
    "method": str,
    "adapter": str,
}
AXES = tuple(_CONVERSIONS)
"""What can differ along an axis; an adapter is named as in the mapping given to `compare`."""
MOST_PICTURES = 100
BARE = "none"
"""What the bare base is called among the adapters."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The values that `name`, one of `AXES`, takes.

    Raises:
        InputError: there is no such axis, no value, or one that does not fit it.
    """

    name: str
    values: tuple[object, ...]

    @classmethod
    def parse(cls, name: str, texts: list[str]) -> Axis:
        """Return the axis called `name` with the values that `texts` say."""
        if name not in AXES:
            raise InputError(f"There is no axis '{name}'; choose one of {', '.join(AXES)}.")
        texts = [text.strip() for text in texts if text.strip()]
        if not texts:
            raise InputError(f"The axis '{name}' has no values; give some.")
        try:
            return cls(name=name, values=tuple(_CONVERSIONS[name](text) for text in texts))
        except ValueError as error:
            raise InputError(f"The axis '{name}' needs numbers, got {', '.join(texts)}.") from error

    def __post_init__(self) -> None:
        allowed = {"sampler": tuple(SCHEDULERS), "method": METHODS}.get(self.name)
        wrong = [value for value in self.values if allowed and value not in allowed]
        if allowed and wrong:
            raise InputError(f"There is no {self.name} '{wrong[0]}'; choose one of {', '.join(allowed)}.")
