"""What a crop of a photo is called while it is trained on: the photo's caption, in one of its variants."""

from __future__ import annotations

import numpy as np

from spectral_diffusion.concepts.concept import DEFAULT_CAPTION, PLACEHOLDER

TEMPLATES = (
    DEFAULT_CAPTION,
    PLACEHOLDER,
    f"a picture of {PLACEHOLDER}",
    f"a close photo of {PLACEHOLDER}",
    f"one {PLACEHOLDER}",
    f"here is {PLACEHOLDER}",
)
"""Captions of photos that come without one (as in textual inversion, Gal et al. 2022, arXiv 2208.01618, which has more)."""


def vary_caption(caption: str, dropout: float, rng: np.random.Generator) -> str:
    """Return a variant of `caption`, which holds `PLACEHOLDER`.

    A photo without a caption is called by one of `TEMPLATES`. In a list of tags, which begins with the placeholder and a
    comma, the tags change places (Mix-of-Show's recipe); sentences stay as they were written.

    Args:
        dropout: how often all but the token is left out, so that the token learns what the words do not say.
    """
    if rng.random() < dropout:
        return PLACEHOLDER
    if caption == DEFAULT_CAPTION:
        return TEMPLATES[rng.integers(len(TEMPLATES))]
    first, *tags = [part.strip() for part in caption.split(",")]
    if first != PLACEHOLDER:
        return caption
    return ", ".join([first, *(tags[place] for place in rng.permutation(len(tags)))])
