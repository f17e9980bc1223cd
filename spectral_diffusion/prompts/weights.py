"""Weights inside a prompt, as users of AUTOMATIC1111 write them: `(word)`, `(word:1.2)`, `[word]`, and `BREAK` between parts.

compel, the library for weighted prompts in diffusers, has a syntax and a way of weighing of its own (`word++`), with which a
prompt brought from another tool would draw something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import groupby

from spectral_diffusion.errors import InputError
from spectral_diffusion.prompts.tokens import any_of

STEP = 1.1
"""Round brackets multiply a weight by this, square brackets divide it."""
LARGEST = 10.0
"""A larger weight draws noise only."""

_CLOSES = {")": "(", "]": "["}
_BREAK = "BREAK"
_PARTS = (r"\\[()\[\]\\]", rf"\s*\b{_BREAK}\b\s*", r".")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a prompt whose words count `weight` times."""

    text: str
    weight: float


def parse_prompt(prompt: str, words: Collection[str] = ()) -> tuple[tuple[Piece, ...], ...]:
    """Return the parts of `prompt` that `BREAK` separates, each the pieces of one weight, in order.

    A backslash before a bracket makes it a plain one.

    Args:
        words: words that are left as they are whatever brackets they contain, in any case, such as the tokens of an adapter.

    Raises:
        InputError: a bracket has no partner or a weight is no number; the prompt and the place are named.
    """
    atoms = [f"(?i:{any_of(words).pattern})"] if words else []
    lowered = {word.lower() for word in words}
    levels: list[list[tuple[str, float]]] = [[]]
    opened: list[str] = []
    for match in re.finditer("|".join((*atoms, *_PARTS)), prompt, re.DOTALL):
        part = match.group()
        if part in _CLOSES.values():
            opened.append(part)
            levels.append([])
        elif part in _CLOSES:
            if not opened or opened.pop() != _CLOSES[part]:
                raise InputError(f"The prompt '{prompt}' closes '{part}' without opening it; write '\\{part}' for a plain one.")
            inner, factor = _weighed(levels.pop(), part, prompt)
            levels[-1] += [(text, weight * factor) for text, weight in inner]
        elif part.strip() == _BREAK:
            levels[-1].append((_BREAK, 1.0))
        else:
            plain = part[1:] if len(part) == 2 and part[0] == "\\" and part.lower() not in lowered else part
            levels[-1].append((plain, 1.0))
    if opened:
        raise InputError(f"The prompt '{prompt}' does not close '{opened[-1]}'; write '\\{opened[-1]}' for a plain one.")
    return tuple(_merged(parts) for is_break, parts in groupby(levels[0], lambda part: part[0] == _BREAK) if not is_break)


def plain_words(prompt: str, words: Collection[str] = ()) -> str:
    """Return `prompt` without weights and `BREAK`; as it stands where it cannot be parsed."""
    try:
        parts = parse_prompt(prompt, words)
    except InputError:
        return prompt
    return " ".join("".join(piece.text for piece in part) for part in parts)


def _weighed(inner: list[tuple[str, float]], bracket: str, prompt: str) -> tuple[list[tuple[str, float]], float]:
    """Return what stands in brackets without its number, and how much it counts."""
    colons = [index for index, (text, _) in enumerate(inner) if text == ":"]
    if not colons:
        return inner, STEP if bracket == ")" else 1 / STEP
    number = "".join(text for text, _ in inner[colons[-1] + 1 :]).strip()
    if bracket == "]":
        raise InputError(f"The prompt '{prompt}' has ':{number}' in square brackets, which take no number; write (word:0.8).")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 <= weight <= LARGEST:
        raise InputError(
            f"The prompt '{prompt}' has the weight '{number}'; write a number from 0 to {LARGEST:g} as in (word:1.2), "
            "or '\\(' for a plain bracket."
        )
    return inner[: colons[-1]], weight


def _merged(parts: Iterable[tuple[str, float]]) -> tuple[Piece, ...]:
    """Join what follows each other with the same weight."""
    return tuple(
        Piece(text="".join(text for text, _ in same), weight=weight) for weight, same in groupby(parts, lambda part: part[1])
    )
