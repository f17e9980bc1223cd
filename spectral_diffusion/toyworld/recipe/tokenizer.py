"""The base's tokenizer: CLIP's kind of byte-pair encoding with a small vocabulary, so that every word still tokenizes."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from spectral_diffusion.toyworld.captions import caption
from spectral_diffusion.toyworld.characters import BASE_CHARACTERS
from spectral_diffusion.toyworld.render import TINTS, Thing
from spectral_diffusion.toyworld.scenes import SCENES

VOCABULARY_SIZE = 3000
CONTEXT_LENGTH = 32
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return the tokenizer kept in `folder`, training it first on captions and on the English that ships with Python."""
    if not (folder / "tokenizer_config.json").exists():
        merges = _train_merges(VOCABULARY_SIZE - 2 - 512)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
        pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)
        tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def _train_merges(count: int) -> list[tuple[str, str]]:
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=count + 400, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(_corpus(), trainer)
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:count]


def _corpus() -> Iterator[str]:
    rng = np.random.default_rng(0)
    scenes, tints = list(SCENES), [None, None, None, *TINTS]
    for _ in range(4000):
        chosen = rng.choice(len(BASE_CHARACTERS), 2, replace=False)
        things = tuple(Thing(character=BASE_CHARACTERS[index].name, tint=tints[rng.integers(len(tints))]) for index in chosen)
        yield caption(things, scenes[rng.integers(len(scenes))], rng)
    yield from pydoc_data.topics.topics.values()
