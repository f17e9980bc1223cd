"""Weights in a prompt: read as other tools write them, and felt by the words they stand for only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from narrow_bases import FAMILIES
from random_adapters import random_adapter
from shared_bases import shared_base

from spectral_diffusion.adapters.attach import attached
from spectral_diffusion.bases.base import Base
from spectral_diffusion.errors import InputError
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.generation.regions import Region
from spectral_diffusion.prompts.conditioning import encode, encode_prompts, tokenize
from spectral_diffusion.prompts.weights import parse_prompt, plain_words


def parsed(prompt: str, words: tuple[str, ...] = ()) -> list[list[tuple[str, float]]]:
    return [[(piece.text, round(piece.weight, 4)) for piece in part] for part in parse_prompt(prompt, words)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a dog, near: a lake", [[("a dog, near: a lake", 1)]]),
        ("a (red) car", [[("a ", 1), ("red", 1.1), (" car", 1)]]),
        ("a ((red)) [[car]]", [[("a ", 1), ("red", 1.21), (" ", 1), ("car", 0.8264)]]),
        ("a (red:1.3) car", [[("a ", 1), ("red", 1.3), (" car", 1)]]),
        ("(a (red: 2) car:0.5)", [[("a ", 0.5), ("red", 1), (" car", 0.5)]]),
        (r"a dog \(wet\) \[\\", [[("a dog (wet) [\\", 1)]]),
        ("a dog BREAK (a lake BREAK at night)", [[("a dog", 1)], [("a lake", 1.1)], [("at night", 1.1)]]),
        ("BREAKFAST", [[("BREAKFAST", 1)]]),
    ],
)
def test_prompts_are_read_as_other_tools_write_them(prompt: str, expected: list[list[tuple[str, float]]]) -> None:
    assert parsed(prompt) == expected


def test_a_token_with_brackets_or_a_colon_stays_a_word() -> None:
    assert parsed("([V]:1.2) and <a:b>", ("[V]", "<a:b>")) == [[("[V]", 1.2), (" and <a:b>", 1)]]
    assert parsed("[v] asleep", ("[V]",)) == [[("[v] asleep", 1)]]


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("a (red:1.3) [[car]]", "a red car"),
        ("a dog BREAK (at night:0.8)", "a dog at night"),
        (r"a dog \(wet\)", "a dog (wet)"),
        ("a (dog", "a (dog"),
        ("([V]:1.2) asleep", "[V] asleep"),
    ],
)
def test_a_prompt_has_plain_words(prompt: str, plain: str) -> None:
    assert plain_words(prompt, ("[V]",)) == plain


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (red car", r"'a \(red car' does not close '\('; write '\\\(' for a plain one"),
        ("a red] car", r"closes '\]' without opening it"),
        ("a (red] car", r"closes '\]' without opening it"),
        ("a (red:) car", "has the weight ''; write a number from 0 to 10"),
        ("a (red:big) car", "has the weight 'big'"),
        ("a (red:nan) car", "has the weight 'nan'"),
        ("a (red:-1) car", "has the weight '-1'"),
        ("a (red:1e9) car", "has the weight '1e9'"),
        ("a [red:0.5] car", r"square brackets, which take no number; write \(word:0.8\)"),
    ],
)
def test_a_malformed_weight_is_one_sentence(prompt: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_prompt(prompt)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_weights_nothing_changes_and_a_weight_stretches_its_word_only(family: str, loaded_bases: dict[str, Base]) -> None:
    base = loaded_bases[family]
    plain = encode(base, tokenize(base, ["a red car", ""]))
    read = encode_prompts(base, ["a red car", ""], {})
    assert torch.equal(read["encoder_hidden_states"], plain["encoder_hidden_states"])
    added = plain.get("added_cond_kwargs", {})
    assert all(torch.equal(read["added_cond_kwargs"][name], value) for name, value in added.items())
    weighed = encode_prompts(base, ["a (red:1.5) car", ""], {})["encoder_hidden_states"]
    states, empty = plain["encoder_hidden_states"]
    torch.testing.assert_close(weighed[0, 2] - empty[2], 1.5 * (states[2] - empty[2]), atol=1e-5, rtol=1e-4)
    others = [position for position in range(states.shape[0]) if position != 2]
    assert torch.equal(weighed[0, others], states[others]) and torch.equal(weighed[1], empty)
    nothing = encode_prompts(base, ["a (red:0) car"], {})["encoder_hidden_states"]
    torch.testing.assert_close(nothing[0, 2], empty[2])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_break_puts_prompts_behind_each_other(family: str, loaded_bases: dict[str, Base]) -> None:
    base = loaded_bases[family]
    read = encode_prompts(base, ["a dog BREAK at night", "snow"], {})
    first, second, empty, snow = encode(base, tokenize(base, ["a dog", "at night", "", "snow"]))["encoder_hidden_states"]
    expected = torch.stack([torch.cat([first, second]), torch.cat([snow, empty])])
    torch.testing.assert_close(read["encoder_hidden_states"], expected)
    if family == "sdxl":
        pooled = encode(base, tokenize(base, ["a dog", "snow"]))["added_cond_kwargs"]["text_embeds"]
        torch.testing.assert_close(read["added_cond_kwargs"]["text_embeds"], pooled)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_long_prompt_goes_on_in_a_new_part(family: str, loaded_bases: dict[str, Base]) -> None:
    base = loaded_bases[family]
    first, second = " ".join(["dog"] * 75), "cat at unbelievably night"
    long, broken, other, negative = (
        encode_prompts(base, [text, "snow"], {})
        for text in (f"{first} {second}", f"{first} BREAK {second}", f"{first} cat by day", "snow")
    )
    assert long["encoder_hidden_states"].shape[1] == 2 * 77 and negative["encoder_hidden_states"].shape[1] == 77
    assert torch.equal(long["encoder_hidden_states"], broken["encoder_hidden_states"])
    assert not torch.equal(long["encoder_hidden_states"], other["encoder_hidden_states"])
    if family == "sdxl":
        assert torch.equal(long["added_cond_kwargs"]["text_embeds"], broken["added_cond_kwargs"]["text_embeds"])


@torch.no_grad()
def test_all_vectors_of_a_token_carry_its_weight(tiny_base_folder: Path) -> None:
    base = shared_base("tiny", tiny_base_folder)
    adapter = random_adapter(base, vectors=3)
    words = {concept.token: concept.words for concept in adapter.concepts}
    with attached(base, adapter):
        plain, weighed, written = encode_prompts(base, ["a <V1>", "a (<v1>:2)", "a <V1> <V1>_1 <V1>_2"], words)[
            "encoder_hidden_states"
        ]
    assert [bool(row.any()) for row in (weighed - plain)[:7]] == [False, False, True, True, True, False, False]
    assert not torch.equal(plain, written)  # the token stands for its three vectors already


def test_pictures_feel_weights_in_every_prompt(tiny_base_folder: Path) -> None:
    base = shared_base("tiny", tiny_base_folder)
    plain = {"prompt": "a red car", "negative_prompt": "snow", "regions": (Region(prompt="a dog", negative_prompt="rain"),)}
    weighed = [
        {"prompt": "a (red:3) car", "regions": ()},
        {"prompt": "a red car BREAK at night", "negative_prompt": "(snow:3)", "regions": ()},
        {"regions": (Region(prompt="a (dog:3)", negative_prompt="rain"),)},
        {"regions": (Region(prompt="a dog", negative_prompt="rain BREAK hail"),)},
    ]
    drawn = [
        generate(base, Drawing(**plain | changed, steps=2))[0].image.tobytes() for changed in ({}, {"regions": ()}, *weighed)
    ]
    assert len(set(drawn)) == len(drawn)
    for prompts in ({"prompt": "a (dog"}, {"negative_prompt": "(a:b)"}, {"regions": (Region(prompt="a dog]"),)}):
        with pytest.raises(InputError, match=r"The prompt '.*'"):
            generate(base, Drawing(**plain | prompts, steps=2))
