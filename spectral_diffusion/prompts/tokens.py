"""Things that a prompt names: several in a row, and the tokens of concepts, found as the tokenizer finds them, in any case and
the longest where one begins another."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

_DETERMINED = re.compile(r"\b(an?|the|my|your|his|her|its|our|their|this|that|one)\s+[(\[]*$", re.IGNORECASE)


def listed(phrases: Sequence[str]) -> str:
    """Return `a`, `a and b` or `a, b and c`: how prompts name several things from left to right."""
    *first, last = phrases
    return f"{', '.join(first)} and {last}" if first else last


def tokens_in(prompt: str, tokens: Collection[str]) -> list[str]:
    """Return which of `tokens` stand in `prompt`, in the order in which it names them first."""
    if not tokens:
        return []
    written = {token.lower(): token for token in tokens}
    return list(dict.fromkeys(written[match.group().lower()] for match in any_of(tokens).finditer(prompt)))


def marked_words(prompt: str, tokens: Collection[str]) -> list[str]:
    """Return the words between angle brackets in `prompt` that are none of `tokens`, such as a token that is misspelt."""
    return [word for word in dict.fromkeys(re.findall(r"<[^<>\s]+>", prompt)) if not tokens_in(word, tokens)]


def expand_prompt(prompt: str, words: Mapping[str, str]) -> str:
    """Write every token as the words that stand for it: `<V1>` becomes `<V1> <V1>_1`, or its class word."""
    if not words:
        return prompt
    lowered = {token.lower(): written for token, written in words.items()}
    return any_of(words).sub(lambda match: lowered[match.group().lower()], prompt)


def name_by_class(prompt: str, class_words: Mapping[str, str]) -> str:
    """Write every token as its class word, with an article where none stands before: `<V1>, my <V2>` gives `a dog, my cat`.

    Args:
        class_words: token to class word; a token that shall stay is given as itself.
    """

    def word(match: re.Match[str]) -> str:
        found = lowered[match.group().lower()]
        if found.lower() == match.group().lower():
            return found
        article = "an" if found[:1].lower() in tuple("aeiou") else "a"
        return found if _DETERMINED.search(prompt, 0, match.start()) else f"{article} {found}"

    if not class_words:
        return prompt
    lowered = {token.lower(): found for token, found in class_words.items()}
    return any_of(class_words).sub(word, prompt)


def any_of(tokens: Collection[str]) -> re.Pattern[str]:
    """Return the pattern that finds each of `tokens`, of which there is one at least."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)), re.IGNORECASE)
