"""CLIP's tokenizer, built from the vocabulary inside the open_clip_torch package, so that none need be downloaded."""

from __future__ import annotations

import gzip
from importlib.resources import files

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH = 77
WORDS = 49408
"""Words of every released text encoder: 256 bytes, the same at a word's end, the merges, start and end of text."""


def clip_tokenizer(*, pad_token: str) -> CLIPTokenizer:
    """Return the tokenizer of all released text encoders; they differ in `pad_token` only.

    As in those that diffusers folders hold, a pad token inside a text stands for itself: `?!` is two words where it is `!`.
    """
    lines = gzip.decompress((files("open_clip") / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines[1 : 1 + WORDS - 2 * 256 - 2]]
    letters = _letters()
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=CONTEXT_LENGTH)


def _letters() -> list[str]:
    """Return the letters that stand for the 256 bytes, in the vocabulary's order: printable bytes first, each as itself."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = sorted(set(ByteLevel.alphabet()) - {chr(byte) for byte in printable})
    return [*(chr(byte) for byte in printable), *others]
