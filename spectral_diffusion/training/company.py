"""Who stands beside each sample of a step that is made among the others.

A picture may be drawn with any of the concepts attached, all of them or two out of eight. So each sample is shown with some of
the others, one or all or any number between, and a concept can lean on none of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


def draw_company(own: int, concepts: int, samples: int, generator: torch.Generator) -> torch.Tensor:
    """Return for samples of concept number `own` which of all `concepts` are there, `(samples, concepts)`, 1 or 0.

    It itself always is, and at least one other where there is one; every number of others comes as often.
    """
    order = torch.rand(samples, concepts, generator=generator)
    order[:, own] = -1
    others = torch.randint(1, max(concepts, 2), (samples, 1), generator=generator)
    return (order.argsort(1).argsort(1) <= others).float()


@dataclass
class Company:
    """Lets each sample of a batch pass through the change of those only that are there.

    Attributes:
        present: `(samples, concepts)`, 1 or 0; None where every sample passes through all there is.
    """

    present: torch.Tensor | None = None
    _counts: dict[tuple[int, int, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def meet(self, present: torch.Tensor | None) -> None:
        """Let those be there whom `present` tells, until the next call."""
        self.present = present
        self._counts.clear()

    def gate(self, key: str, read: torch.Tensor) -> torch.Tensor | None:
        """Return how much each column of `read (batch, n, k)` counts, the concepts' columns in their order; see `attach.Gate`.

        The batch may hold every sample several times, one after the other, as text encoders read it layer by layer.
        """
        if self.present is None:
            return None
        copies, columns = len(read) // len(self.present), read.shape[-1] // self.present.shape[1]
        kind = copies, columns, read.dtype
        if kind not in self._counts:  # the same for all layers of a pass
            each = self.present.repeat_interleave(copies, 0).repeat_interleave(columns, 1)
            self._counts[kind] = each[:, None].to(read.dtype)
        return self._counts[kind]
