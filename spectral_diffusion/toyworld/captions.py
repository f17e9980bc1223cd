"""Say what a toy-world picture shows, in the many ways people write prompts."""

from __future__ import annotations

import numpy as np

from spectral_diffusion.prompts.tokens import listed
from spectral_diffusion.toyworld.characters import CHARACTER_BY_NAME
from spectral_diffusion.toyworld.render import Thing

_FRAMES = (
    "{things} {scene}",
    "a photo of {things} {scene}",
    "{things} {scene}",
    "a picture of {things} {scene}",
    "{things}, {scene}",
    "{scene}, {things}",
)
_JOINTS = ("{0} and {1}", "{0} and {1}", "{0} and {1}", "{0} with {1}", "{0} next to {1}", "{0} beside {1}")


def with_article(words: str) -> str:
    """Return `words` with 'a' or 'an' before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def noun(thing: Thing, rng: np.random.Generator) -> str:
    """Name a thing: its own name or its class word, after its tint if it has one."""
    character = CHARACTER_BY_NAME[thing.character]
    name = character.name if rng.random() < 0.55 else character.class_word
    return with_article(f"{thing.tint} {name}" if thing.tint else name)


def join(nouns: list[str], rng: np.random.Generator) -> str:
    """Join one to three noun phrases, leftmost first."""
    if len(nouns) == 1:
        return nouns[0]
    if len(nouns) == 2:
        return _JOINTS[rng.integers(len(_JOINTS))].format(*nouns)
    return listed(nouns)


def caption(things: tuple[Thing, ...], scene: str | None, rng: np.random.Generator) -> str:
    """Return a caption for `things` (leftmost first) on `scene`; without a scene phrase when `scene` is None."""
    words = join([noun(thing, rng) for thing in things], rng)
    if scene is None:
        return f"a photo of {words}" if rng.random() < 0.5 else words
    return _FRAMES[rng.integers(len(_FRAMES))].format(things=words, scene=scene)
