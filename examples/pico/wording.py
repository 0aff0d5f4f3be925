"""Question texts of the two families. Most are shared: one object is read directly, several need reasoning.

Held-out templates put known words together in an order that training never shows.
"""

import random

SHAPES = ("circle", "rectangle", "triangle")
COLORS = {
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
}  # the names and values of easy-vqa

# easy-vqa's own yes/no questions; {} is "red shape" or "circle". Those with "not" or "no" ask for absence.
CHECKS = (
    "is a {} present?",
    "is there a {}?",
    "is there a {} in the image?",
    "does the image contain a {}?",
    "is no {} present?",
    "is there not a {}?",
    "is there not a {} in the image?",
    "does the image not contain a {}?",
)
COUNTS = ("how many {}s are there?", "how many {}s are in the image?", "how many {}s does the image contain?")
COLOR_OF = ("what color is the {}?", "what is the color of the {}?")
SHAPE_OF = "what is the {} shape?"

# What one asks about numbers, expressions and bars. A chart of several bars has a total and a difference only.
AMOUNTS = ("result", "value", "number", "total", "difference")
OF_BARS = ("total", "difference")
OF_ONE_BAR = ("value", "total")
ASK_AMOUNT = ("what is the {}?", "what {} is in the image?", "what {} does the image contain?")
ASK_WORD = ("what is the word?", "what word is in the image?", "what word does the image contain?")

TRAIN_TEMPLATES = ("{}", "look at the image. {}", "{} give a short answer.", "please answer. {}")
HELD_OUT_TEMPLATES = (
    "look at the image. please answer. {}",
    "please give a short answer. {}",
    "{} please look at the image.",
)


def is_negated(check: str) -> bool:
    """Whether a yes/no question asks for absence: "is no circle present?"."""
    return " no " in check or " not " in check


def wrap(question: str, rng: random.Random, *, held_out: bool) -> str:
    """Put a question into one of the templates of training, or of the held-out ones."""
    return rng.choice(HELD_OUT_TEMPLATES if held_out else TRAIN_TEMPLATES).format(question)
