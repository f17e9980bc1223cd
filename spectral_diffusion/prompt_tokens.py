"""Tokens of concepts in a prompt, found as the tokenizer finds them: in any case, and the longest where one begins another."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping


def tokens_in(prompt: str, tokens: Collection[str]) -> list[str]:
    """Return which of `tokens` stand in `prompt`, in the order in which it names them first."""
    if not tokens:
        return []
    written = {token.lower(): token for token in tokens}
    return list(dict.fromkeys(written[match.group().lower()] for match in _any_of(tokens).finditer(prompt)))


def expand_prompt(prompt: str, words: Mapping[str, str]) -> str:
    """Write every token as the words that stand for it: `<V1>` becomes `<V1> <V1>_1`, or its class word."""
    if not words:
        return prompt
    lowered = {token.lower(): written for token, written in words.items()}
    return _any_of(words).sub(lambda match: lowered[match.group().lower()], prompt)


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)), re.IGNORECASE)
