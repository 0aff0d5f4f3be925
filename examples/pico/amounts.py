"""Queries about amounts and words: one printed number, word or bar (direct); an expression or several bars (reasoning)."""

import random

from PIL import Image, ImageDraw, ImageFont

from .query import CELL, GRID, SIZE, Picture, Query, background
from .wording import AMOUNTS, ASK_AMOUNT, ASK_WORD, COLORS, OF_BARS, OF_ONE_BAR

WORDS = ("ant", "bee", "cat", "cow", "dog", "fox", "hen", "owl", "pig", "rat", "cup", "hat", "key", "map", "pen", "sun")
HIGHEST = 7  # units of a bar
_UNIT = 8  # pixels per unit
_GROUND = 60  # pixel row on which bars stand


def number(rng: random.Random) -> Query:
    """Read one printed number, 0 to 99."""
    value = rng.randint(0, 99)
    asked = rng.choice(AMOUNTS)
    digits = " ".join(str(value))
    reasoning = (
        f"i see 1 number: {digits}. asked: the {asked}. it reads {value}. so {value}. "
        f"look again: the number is {value}, asked: the {asked}. so {value}."
    )
    return Query(
        rng.choice(ASK_AMOUNT).format(asked), write([str(value)], rng).image, str(value), reasoning, "read-number"
    )


def word(rng: random.Random) -> Query:
    """Read one printed word."""
    text = rng.choice(WORDS)
    reasoning = (
        f"i see 1 word: {' '.join(text)}. asked: the word. it reads {text}. so {text}. "
        f"look again: the word is {text}, asked: the word. so {text}."
    )
    return Query(rng.choice(ASK_WORD), write([text], rng).image, text, reasoning, "read-word")


def one_bar(rng: random.Random) -> Query:
    """Read the height of one bar against the grid lines."""
    height = rng.randint(1, HIGHEST)
    asked = rng.choice(OF_ONE_BAR)
    reasoning = (
        f"i see 1 bar: {height}. asked: the {asked}. it reads {height}. so {height}. "
        f"look again: the bar is {height}, asked: the {asked}. so {height}."
    )
    return Query(rng.choice(ASK_AMOUNT).format(asked), chart([height], rng).image, str(height), reasoning, "read-bar")


def expression(rng: random.Random) -> Query:
    """Work out a printed expression of two or three one-digit numbers; the result is never negative."""
    numbers = [rng.randint(1, 9) for _ in range(rng.choice((2, 3)))]
    signs: list[str] = []
    steps: list[str] = []
    total = numbers[0]
    for term in numbers[1:]:
        sign = rng.choice("+-") if total >= term else "+"
        after = total + term if sign == "+" else total - term
        steps.append(f"{total} {sign} {term} = {after}.")
        signs.append(sign)
        total = after
    shown = str(numbers[0]) + "".join(sign + str(term) for sign, term in zip(signs, numbers[1:], strict=True))
    asked = rng.choice(AMOUNTS)
    reasoning = f"i see {len(numbers)} numbers: {' '.join(shown)}. asked: the {asked}. {' '.join(steps)} so {total}."
    return Query(
        rng.choice(ASK_AMOUNT).format(asked),
        write([shown[:3], shown[3:]] if shown[3:] else [shown], rng).image,
        str(total),
        reasoning,
        "arithmetic",
    )


def bars(rng: random.Random) -> Query:
    """The total of two bars, or the difference of the highest and the lowest of two or three."""
    asked = rng.choice(OF_BARS)
    heights = [rng.randint(1, HIGHEST) for _ in range(2 if asked == "total" else rng.choice((2, 3)))]
    if asked == "total":
        result = sum(heights)
        steps = f"{heights[0]} + {heights[1]} = {result}."
    else:
        result = max(heights) - min(heights)
        steps = f"most {max(heights)}, least {min(heights)}. {max(heights)} - {min(heights)} = {result}."
    reasoning = f"i see {len(heights)} bars: {', '.join(map(str, heights))}. asked: the {asked}. {steps} so {result}."
    return Query(rng.choice(ASK_AMOUNT).format(asked), chart(heights, rng).image, str(result), reasoning, "chart")


def write(lines: list[str], rng: random.Random) -> Picture:
    """Print lines of at most four characters in Pillow's own font, one character in each cell of a jittered grid."""
    image = Image.new("RGB", (SIZE, SIZE), background(rng))
    canvas = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=rng.randint(16, 18))
    ink = _ink(rng)
    cells = [""] * GRID**2
    left, top = rng.randint(0, GRID - max(map(len, lines))), rng.randint(0, GRID - len(lines))
    shift = [rng.randint(-1, 1) + CELL // 2 for _ in range(2)]
    for row, line in enumerate(lines, start=top):
        for column, character in enumerate(line, start=left):
            middle = (CELL * column + shift[0], CELL * row + shift[1])
            canvas.text(middle, character, fill=ink, font=font, anchor="mm", stroke_width=0.6)
            cells[row * GRID + column] = character
    return Picture(image, tuple(cells))


def chart(heights: list[int], rng: random.Random) -> Picture:
    """Bars of whole units on a ground line, with a grid line at every second unit."""
    image = Image.new("RGB", (SIZE, SIZE), background(rng))
    canvas = ImageDraw.Draw(image)
    for unit in range(0, HIGHEST + 1, 2):
        shade = 90 if unit == 0 else 205
        canvas.line((0, _GROUND - unit * _UNIT, SIZE, _GROUND - unit * _UNIT), fill=(shade, shade, shade))
    cells = [""] * GRID**2
    slots = sorted(rng.sample(range(GRID), len(heights)))
    for slot, height in zip(slots, heights, strict=True):
        left = slot * CELL + rng.randint(2, 4)
        canvas.rectangle((left, _GROUND - height * _UNIT, left + rng.randint(8, 10), _GROUND), fill=_ink(rng))
        for row in range((_GROUND - height * _UNIT) // CELL, GRID):
            cells[row * GRID + slot] = f"bar {height}"
    return Picture(image, tuple(cells))


def _ink(rng: random.Random) -> tuple[int, int, int]:
    return COLORS[rng.choice([name for name in COLORS if name not in ("yellow", "green")])]
