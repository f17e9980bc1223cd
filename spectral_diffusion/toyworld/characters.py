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

EXTRA_CHARACTERS: tuple[Character, ...] = (
    _base("rat", "rat", "1f400"),
    _base("field-mouse", "field mouse", "1f401"),
    _base("ox", "ox", "1f402"),
    _base("buffalo", "buffalo", "1f403"),
    _base("dairy-cow", "dairy cow", "1f404"),
    _base("tiger", "tiger", "1f405"),
    _base("hare", "hare", "1f407"),
    _base("crocodile", "crocodile", "1f40a"),
    _base("whale", "whale", "1f40b"),
    _base("snail", "snail", "1f40c"),
    _base("stallion", "stallion", "1f40e"),
    _base("ram", "ram", "1f40f"),
    _base("goat", "goat", "1f410"),
    _base("sheep", "sheep", "1f411"),
    _base("macaque", "macaque", "1f412"),
    _base("rooster", "rooster", "1f413"),
    _base("chicken", "chicken", "1f414"),
    _base("hog", "hog", "1f416"),
    _base("boar", "boar", "1f417"),
    _base("octopus", "octopus", "1f419"),
    _base("bee", "bee", "1f41d"),
    _base("ladybug", "ladybug", "1f41e"),
    _base("fish", "fish", "1f41f"),
    _base("tropical-fish", "fish", "1f420"),
    _base("koala", "koala", "1f428"),
    _base("camel", "camel", "1f42a"),
    _base("dolphin", "dolphin", "1f42c"),
    _base("tigress", "tiger", "1f42f"),
    _base("crab", "crab", "1f980"),
    _base("eagle", "eagle", "1f985"),
    _base("bat", "bat", "1f987"),
    _base("shark", "shark", "1f988"),
    _base("owl", "owl", "1f989"),
    _base("butterfly", "butterfly", "1f98b"),
    _base("deer", "deer", "1f98c"),
    _base("gorilla", "gorilla", "1f98d"),
    _base("rhino", "rhino", "1f98f"),
    _base("giraffe", "giraffe", "1f992"),
    _base("hedgehog", "hedgehog", "1f994"),
    _base("sauropod", "dinosaur", "1f995"),
    _base("kangaroo", "kangaroo", "1f998"),
    _base("llama", "llama", "1f999"),
    _base("peacock", "peacock", "1f99a"),
    _base("hippo", "hippo", "1f99b"),
    _base("badger", "badger", "1f9a1"),
    _base("swan", "swan", "1f9a2"),
    _base("mammoth", "mammoth", "1f9a3"),
    _base("sloth", "sloth", "1f9a5"),
    _base("otter", "otter", "1f9a6"),
    _base("skunk", "skunk", "1f9a8"),
    _base("beaver", "beaver", "1f9ab"),
    _base("seal", "seal", "1f9ad"),
    _base("snake", "snake", "1f40d"),
    _base("sparrow", "sparrow", "1f426"),
    _base("boy", "boy", "1f466"),
    _base("girl", "girl", "1f467"),
    _base("grandfather", "grandfather", "1f474"),
    _base("grandmother", "grandmother", "1f475"),
    _base("baby", "baby", "1f476"),
    _base("policeman", "policeman", "1f46e"),
    _base("builder", "builder", "1f477"),
    _base("guard", "guard", "1f482"),
    _base("prince", "prince", "1f934"),
    _base("ninja", "ninja", "1f977"),
    _base("vampire", "vampire", "1f9db"),
    _base("elf", "elf", "1f9dd"),
    _base("fairy", "fairy", "1f9da"),
    _base("zombie", "zombie", "1f9df"),
    _base("ogre", "ogre", "1f479"),
    _base("skull", "skull", "1f480"),
    _base("apple", "apple", "1f34e"),
    _base("banana", "banana", "1f34c"),
    _base("strawberry", "strawberry", "1f353"),
    _base("pineapple", "pineapple", "1f34d"),
    _base("watermelon", "watermelon", "1f349"),
    _base("hamburger", "hamburger", "1f354"),
    _base("pizza", "pizza", "1f355"),
    _base("cake", "cake", "1f382"),
    _base("doughnut", "doughnut", "1f369"),
    _base("ice-cream", "ice cream", "1f366"),
    _base("cactus", "cactus", "1f335"),
    _base("tree", "tree", "1f332"),
    _base("sunflower", "flower", "1f33b"),
    _base("rose", "flower", "1f339"),
    _base("present", "present", "1f381"),
    _base("balloon", "balloon", "1f388"),
    _base("hat", "hat", "1f3a9"),
    _base("crown", "crown", "1f451"),
    _base("sandal", "shoe", "1f460"),
    _base("sneaker", "shoe", "1f45f"),
    _base("shirt", "shirt", "1f455"),
    _base("dress", "dress", "1f457"),
    _base("camera", "camera", "1f4f7"),
    _base("computer", "computer", "1f4bb"),
    _base("television", "television", "1f4fa"),
    _base("key", "key", "1f511"),
    _base("lock", "lock", "1f512"),
    _base("bell", "bell", "1f514"),
    _base("hammer", "hammer", "1f528"),
    _base("rocket", "rocket", "1f680"),
    _base("helicopter", "helicopter", "1f681"),
    _base("locomotive", "train", "1f682"),
    _base("bus", "bus", "1f68c"),
    _base("ambulance", "ambulance", "1f691"),
    _base("fire-engine", "fire engine", "1f692"),
    _base("tractor", "tractor", "1f69c"),
    _base("ship", "ship", "1f6a2"),
    _base("bicycle", "bicycle", "1f6b2"),
    _base("scooter", "scooter", "1f6f5"),
    _base("saucer", "saucer", "1f6f8"),
    _base("house", "house", "1f3e0"),
    _base("castle", "castle", "1f3f0"),
    _base("tent", "tent", "26fa"),
    _base("sailboat", "sailboat", "26f5"),
    _base("clock", "clock", "23f0"),
    _base("cup", "cup", "2615"),
    _base("umbrella", "umbrella", "2614"),
    _base("guitar", "guitar", "1f3b8"),
    _base("trumpet", "trumpet", "1f3ba"),
    _base("violin", "violin", "1f3bb"),
    _base("drum", "drum", "1f941"),
    _base("suitcase", "suitcase", "1f9f3"),
    _base("basket", "basket", "1f9fa"),
    _base("chair", "chair", "1fa91"),
    _base("baseball", "baseball", "26be"),
    _base("volleyball", "volleyball", "1f3d0"),
    _base("football", "football", "1f3c8"),
    _base("box", "box", "1f4e6"),
    _base("cheese", "cheese", "1f9c0"),
    _base("bread", "bread", "1f35e"),
)
"""Further characters of the base: whoever has seen many things learns a new one from a few photos. Neither the judge nor the
scoring CLIP knows these, no benchmark asks for them, and none bears a class word of the others."""

CHARACTERS: tuple[Character, ...] = BASE_CHARACTERS + HELD_OUT_CHARACTERS
"""Those that the judge tells apart."""
CHARACTER_BY_NAME: dict[str, Character] = {character.name: character for character in CHARACTERS + EXTRA_CHARACTERS}
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
