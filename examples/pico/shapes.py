"""Queries about shapes: one shape (real easy-vqa images and questions, direct) or several (rendered, reasoning)."""

import json
import random
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw

from .query import CELL, GRID, SIZE, Picture, Query, background
from .wording import CHECKS, COLOR_OF, COLORS, COUNTS, SHAPE_OF, SHAPES, is_negated

Split = Literal["train", "test"]
_COLOR = re.compile(rf"\b({'|'.join(COLORS)})\b")
_SHAPE = re.compile(rf"\b({'|'.join(SHAPES)})s?\b")


@dataclass(frozen=True, slots=True)
class Thing:
    """One drawn shape."""

    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"

    def fits(self, wanted: str) -> bool:
        """Whether it is a `wanted`: "shape", "circle", "red shape"."""
        color, shape = _COLOR.search(wanted), _SHAPE.search(wanted)
        return (color is None or color[1] == self.color) and (shape is None or shape[1] == self.shape)


def easy_vqa(split: Split, rng: random.Random) -> Query:
    """A question of easy-vqa as it is published, with the published answer."""
    question, answer, image = rng.choice(_known_questions(split))
    found = [things(split)[image]]
    return Query(question, image_path(split, image), answer, think_aloud(question, found, answer), "easy-vqa")


def count_one(split: Split, rng: random.Random) -> Query:
    """A counting question about an easy-vqa image; its one shape is known from the published answers."""
    known = things(split)
    image = rng.choice(list(known))
    question = rng.choice(COUNTS).format(wanted_by(rng, [known[image]]))
    return _query(question, image_path(split, image), [known[image]], "count-one")


def several(rng: random.Random) -> Query:
    """A rendered image of two to four shapes, and a counting (60 %), yes/no (25 %) or finding (15 %) question."""
    found = [Thing(rng.choice(list(COLORS)), rng.choice(SHAPES)) for _ in range(rng.randint(2, 4))]
    if rng.random() < 0.5:  # a colour or a shape that occurs more than once makes counting worth the while
        found[1] = (
            Thing(found[0].color, found[1].shape) if rng.random() < 0.5 else Thing(found[1].color, found[0].shape)
        )
    kind = rng.choices(("count", "check", "find"), (60, 25, 15))[0]
    question = _find(rng, found) if kind == "find" else None
    if kind == "check":
        question = rng.choice(CHECKS).format(_kind_of_thing(rng, found))
    if question is None:
        question = rng.choice(COUNTS).format(wanted_by(rng, found))
    return _query(question, draw(found, rng).image, found, "count-several")


def wanted_by(rng: random.Random, found: list[Thing]) -> str:
    """What is counted: every "shape", or only those of a kind."""
    return "shape" if rng.random() < 0.3 else _kind_of_thing(rng, found)


def _kind_of_thing(rng: random.Random, found: list[Thing]) -> str:
    """ "red shape" or "circle": in half of the cases one that is there."""
    thing = rng.choice(found) if rng.random() < 0.5 else Thing(rng.choice(list(COLORS)), rng.choice(SHAPES))
    return f"{thing.color} shape" if rng.random() < 0.7 else thing.shape


def _find(rng: random.Random, found: list[Thing]) -> str | None:
    """A question that one of the things answers alone, or None where no kind is unique."""
    unique = [t for t in found if [s.shape for s in found].count(t.shape) == 1]
    if unique and rng.random() < 0.5:
        return rng.choice(COLOR_OF).format(rng.choice(unique).shape)
    unique = [t for t in found if [s.color for s in found].count(t.color) == 1]
    return SHAPE_OF.format(rng.choice(unique).color) if unique else None


def solve(question: str, found: list[Thing]) -> str:
    """The exact answer to any of the questions above."""
    matches = [thing for thing in found if thing.fits(question)]
    if question.startswith("how many"):
        return str(len(matches))
    if "color" in question:
        return matches[0].color
    if question.startswith("what"):
        return matches[0].shape
    return "yes" if bool(matches) != is_negated(question) else "no"


def think_aloud(question: str, found: list[Thing], answer: str) -> str:
    """List the shapes, say what is asked, collect what fits. About one shape this is overthinking, with a second look."""
    matches = [str(thing) for thing in found if thing.fits(question)]
    color, shape = _COLOR.search(question), _SHAPE.search(question)
    wanted = f"{color[1]} shape" if color else shape[1] if shape else "shape"
    if question.startswith("how many"):
        asked = f"how many {wanted}"
    elif question.startswith("what"):
        asked = f"the color of the {wanted}" if "color" in question else f"the shape of the {wanted}"
    else:
        asked = f"{'no' if is_negated(question) else 'a'} {wanted}"
    text = (
        f"i see {len(found)}: {', '.join(map(str, found))}. asked: {asked}. "
        f"found {len(matches)}: {', '.join(matches) or 'none'}. so {answer}."
    )
    if len(found) == 1:
        text += f" look again: the shape is a {found[0]}, asked: {asked}. so {answer}."
    return text


def draw(found: list[Thing], rng: random.Random) -> Picture:
    """Draw things in easy-vqa's style: one anywhere, several in reading order on a jittered 2 x 2 grid."""
    image = Image.new("RGB", (SIZE, SIZE), background(rng))
    canvas = ImageDraw.Draw(image)
    cells = [""] * GRID**2
    room, widths = (SIZE, (11, 34)) if len(found) == 1 else (SIZE // 2, (16, 26))
    places = [0] if len(found) == 1 else sorted(rng.sample(range(4), len(found)))
    for place, thing in zip(places, found, strict=True):
        width = rng.randint(*widths)
        height = rng.randint(*widths) if thing.shape == "rectangle" else width
        left = place % 2 * room + rng.randint(2, room - width - 2)
        top = place // 2 * room + rng.randint(2, room - height - 2)
        box = (left, top, left + width, top + height)
        _draw_one(canvas, thing, box, fill=COLORS[thing.color])
        mask = Image.new("L", (SIZE, SIZE))
        _draw_one(ImageDraw.Draw(mask), thing, box, fill=255)
        for cell in _cells_of(mask):
            cells[cell] = str(thing)
    return Picture(image, tuple(cells))


def _cells_of(mask: Image.Image) -> list[int]:
    """The cells of which a mask covers a quarter; at least the one that it covers most."""
    boxes = [(column * CELL, row * CELL) for row in range(GRID) for column in range(GRID)]
    pixels = [mask.crop((x, y, x + CELL, y + CELL)).histogram()[-1] for x, y in boxes]
    return [cell for cell, count in enumerate(pixels) if count >= min(CELL * CELL // 4, max(pixels))]


def _draw_one(
    canvas: ImageDraw.ImageDraw, thing: Thing, box: tuple[int, int, int, int], *, fill: int | tuple[int, int, int]
) -> None:
    left, top, right, bottom = box
    if thing.shape == "circle":
        canvas.ellipse(box, fill=fill)
    elif thing.shape == "rectangle":
        canvas.rectangle(box, fill=fill)
    else:
        canvas.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=fill)


def _query(question: str, image: Image.Image | Path, found: list[Thing], source: str) -> Query:
    answer = solve(question, found)
    return Query(question, image, answer, think_aloud(question, found, answer), source)


def image_path(split: Split, image: int) -> Path:
    """The published PNG."""
    return _folder() / split / "images" / f"{image}.png"


@cache
def questions(split: Split) -> list[tuple[str, str, int]]:
    """The published (question, answer, image number) rows."""
    rows = json.loads((_folder() / split / "questions.json").read_text())
    return [(question, answer, image) for question, answer, image in rows]


@cache
def _known_questions(split: Split) -> list[tuple[str, str, int]]:
    """Those whose image's shape is known: a derivation can be written."""
    return [row for row in questions(split) if row[2] in things(split)]


@cache
def things(split: Split) -> dict[int, Thing]:
    """{image number: its shape}, where the published answers say both colour and shape."""
    color: dict[int, str] = {}
    shape: dict[int, str] = {}
    for question, answer, image in questions(split):
        present = answer == ("no" if is_negated(question) else "yes")
        for names, found in ((COLORS, color), (SHAPES, shape)):
            if answer in names:
                found[image] = answer
            for name in names:  # a "yes" to "is there a red shape?", and the "red" of "what is the red shape?"
                if re.search(rf"\b{name}\b", question) and (present or question.startswith("what")):
                    found[image] = name
    return {image: Thing(color[image], shape[image]) for image in sorted(color.keys() & shape.keys())}


def _folder() -> Path:
    found = find_spec("easy_vqa")
    if found is None or found.origin is None:
        raise ImportError("the pico families need easy-vqa's images: pip install --no-deps easy-vqa")
    return Path(found.origin).parent / "data"
