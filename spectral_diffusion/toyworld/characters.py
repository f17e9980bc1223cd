"""Who lives in the toy world.

Every character is one drawing of Microsoft's Fluent Emoji (MIT). Characters of the base are trained into the embedded
base under their own name and their class word; held-out characters are never shown to it and are known to it by class
word only, so that they can play the part of a user's own dog, cat or friend.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Character:
    """One drawing: `name` is unique, `class_word` is what the base may call it, `codepoint` is the emoji's file name."""

    name: str
    class_word: str
    codepoint: str
    held_out: bool = False


def _base(name: str, class_word: str, codepoint: str) -> Character:
    return Character(name=name, class_word=class_word, codepoint=codepoint)


def _held_out(name: str, class_word: str, codepoint: str) -> Character:
    return Character(name=name, class_word=class_word, codepoint=codepoint, held_out=True)


BASE_CHARACTERS: tuple[Character, ...] = (
    _base("puppy", "dog", "1f436"),
    _base("hound", "dog", "1f415"),
    _base("kitten", "cat", "1f431"),
    _base("tabby", "cat", "1f408"),
    _base("lion", "lion", "1f981"),
    _base("cow", "cow", "1f42e"),
    _base("pig", "pig", "1f437"),
    _base("rabbit", "rabbit", "1f430"),
    _base("mouse", "mouse", "1f42d"),
    _base("bear", "bear", "1f43b"),
    _base("panda", "panda", "1f43c"),
    _base("monkey", "monkey", "1f435"),
    _base("frog", "frog", "1f438"),
    _base("horse", "horse", "1f434"),
    _base("penguin", "penguin", "1f427"),
    _base("duck", "bird", "1f986"),
    _base("elephant", "elephant", "1f418"),
    _base("fox", "fox", "1f98a"),
    _base("turtle", "turtle", "1f422"),
    _base("teddy", "toy", "1f9f8"),
    _base("robot", "robot", "1f916"),
    _base("vase", "vase", "1f3fa"),
    _base("car", "car", "1f697"),
    _base("ball", "ball", "26bd"),
    _base("pumpkin", "pumpkin", "1f383"),
    _base("snowman", "snowman", "26c4"),
    _base("mushroom", "mushroom", "1f344"),
    _base("backpack", "bag", "1f392"),
    _base("ghost", "ghost", "1f47b"),
    _base("man", "man", "1f468"),
    _base("woman", "woman", "1f469"),
    _base("clown", "man", "1f921"),
)

HELD_OUT_CHARACTERS: tuple[Character, ...] = (
    _held_out("poodle", "dog", "1f429"),
    _held_out("service-dog", "dog", "1f415-200d-1f9ba"),
    _held_out("wolf", "dog", "1f43a"),
    _held_out("black-cat", "cat", "1f408-200d-2b1b"),
    _held_out("leopard", "cat", "1f406"),
    _held_out("raccoon", "bear", "1f99d"),
    _held_out("polar-bear", "bear", "1f43b-200d-2744-fe0f"),
    _held_out("hamster", "mouse", "1f439"),
    _held_out("unicorn", "horse", "1f984"),
    _held_out("zebra", "horse", "1f993"),
    _held_out("dragon", "toy", "1f432"),
    _held_out("nesting-doll", "toy", "1fa86"),
    _held_out("pinata", "toy", "1fa85"),
    _held_out("t-rex", "toy", "1f996"),
    _held_out("alien", "toy", "1f47d"),
    _held_out("flamingo", "bird", "1f9a9"),
    _held_out("parrot", "bird", "1f99c"),
    _held_out("chick", "bird", "1f423"),
    _held_out("teapot", "vase", "1fad6"),
    _held_out("taxi", "car", "1f695"),
    _held_out("basketball", "ball", "1f3c0"),
    _held_out("handbag", "bag", "1f45c"),
    _held_out("wizard", "man", "1f9d9-200d-2642-fe0f"),
    _held_out("astronaut", "man", "1f468-200d-1f680"),
    _held_out("santa", "man", "1f385"),
    _held_out("cook", "woman", "1f469-200d-1f373"),
    _held_out("princess", "woman", "1f478"),
)

CHARACTERS: tuple[Character, ...] = BASE_CHARACTERS + HELD_OUT_CHARACTERS
CHARACTER_BY_NAME: dict[str, Character] = {character.name: character for character in CHARACTERS}
CLASS_WORDS: tuple[str, ...] = tuple(dict.fromkeys(character.class_word for character in BASE_CHARACTERS))

SAMPLE_CONCEPTS: tuple[str, ...] = (
    "poodle",
    "service-dog",
    "black-cat",
    "leopard",
    "nesting-doll",
    "pinata",
    "raccoon",
    "wizard",
)
"""The held-out characters that ship as sample concepts in `concepts/`."""
