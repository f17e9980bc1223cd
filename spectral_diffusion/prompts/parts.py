"""A prompt as a text encoder reads it: parts, each of which fits into its context.

What is longer goes on in a new part, as if `BREAK` stood there: so do AUTOMATIC1111 and ComfyUI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import CLIPTokenizer

from spectral_diffusion.prompts.tokens import any_of, expand_prompt
from spectral_diffusion.prompts.weights import Piece, parse_prompt

_BACK_TO_A_COMMA = 20
"""A full part ends at its last comma if at most so many tokens stand behind it, as in AUTOMATIC1111."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Token ids and their weights, as many of both as the context is long."""

    ids: list[int]
    weights: list[float]


_Word = tuple[list[int], float]
"""The token ids of what stays together, and their weight."""


def parts_of(tokenizer: CLIPTokenizer, prompt: str, words: Mapping[str, str]) -> list[Part]:
    """Return the parts of `prompt`, one at least, each padded as the pipeline does.

    Neither a word nor what stands for a token is divided, unless it alone is longer than a part.

    Args:
        words: each token of the adapter to the words that stand for it.

    Raises:
        InputError: a weight is malformed.
    """
    room = tokenizer.model_max_length - 2
    filled = [
        part
        for pieces in parse_prompt(prompt, words)
        for part in _divided([word for piece in pieces for word in _words(tokenizer, piece, words, room)], tokenizer, room)
    ]
    return [_padded(tokenizer, part) for part in filled or [[]]]


def empty_part(tokenizer: CLIPTokenizer) -> Part:
    """Return a part without words."""
    return _padded(tokenizer, [])


def _words(tokenizer: CLIPTokenizer, piece: Piece, words: Mapping[str, str], room: int) -> list[_Word]:
    """Return the words of `piece`, none longer than `room`."""
    text = expand_prompt(piece.text, words)
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    standing = [match.span() for match in any_of(words.values()).finditer(text)] if words else []
    found: list[list[int]] = []
    before: tuple[int | None, tuple[int, int] | None] = (None, None)
    for number, word, (start, _) in zip(read.input_ids, read.word_ids(), read.offset_mapping, strict=True):
        span = next((span for span in standing if span[0] <= start < span[1]), None)
        if found and len(found[-1]) < room and (word == before[0] or (span is not None and span == before[1])):
            found[-1].append(number)
        else:
            found.append([number])
        before = word, span
    return [(ids, piece.weight) for ids in found]


def _divided(words: Sequence[_Word], tokenizer: CLIPTokenizer, room: int) -> list[Sequence[_Word]]:
    """Return `words` in parts of at most `room` tokens; none gives one part without words."""
    comma, parts = tokenizer.convert_tokens_to_ids(",</w>"), []
    while _length(words) > room:
        end = next(count for count in range(1, len(words) + 1) if _length(words[: count + 1]) > room)
        commas = [count for count in range(1, end + 1) if words[count - 1][0] == [comma]]
        if commas and _length(words[commas[-1] : end]) <= _BACK_TO_A_COMMA:
            end = commas[-1]
        parts.append(words[:end])
        words = words[end:]
    return [*parts, words]


def _length(words: Sequence[_Word]) -> int:
    return sum(len(ids) for ids, _ in words)


def _padded(tokenizer: CLIPTokenizer, words: Sequence[_Word]) -> Part:
    padding = tokenizer.model_max_length - 2 - _length(words)
    ids = [number for own, _ in words for number in own]
    weights = [weight for own, weight in words for _ in own]
    return Part(
        ids=[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding],
        weights=[1.0, *weights, 1.0, *[1.0] * padding],
    )
