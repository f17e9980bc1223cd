"""Tokens in prompts are found as the tokenizer finds them."""

from __future__ import annotations

from spectral_diffusion.prompts.tokens import expand_prompt, tokens_in

CLASS_WORDS = {"<V1>": "dog", "<V10>": "cat", "sks": "vase"}


def test_each_token_becomes_its_words_in_any_case_and_the_longest_first() -> None:
    assert expand_prompt("a <V10>, <v1> and SKS", CLASS_WORDS) == "a cat, dog and vase"
    assert expand_prompt("a <V10>", {}) == "a <V10>"


def test_a_token_that_begins_another_is_not_taken_for_it() -> None:
    assert tokens_in("a sks2 and a <v1>, sks2", ["sks", "<V1>", "sks2", "<V2>"]) == ["sks2", "<V1>"]
    assert tokens_in("a dog", []) == []
