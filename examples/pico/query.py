"""One query of a family, before it becomes a row of a data set."""

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SIZE = 64  # pixels; easy-vqa's
CELL = 16  # pixels: what one visual token sees, and one printed character fills
GRID = SIZE // CELL


@dataclass(frozen=True, slots=True)
class Query:
    """A question about an image, with its exact answer and the derivation of a model that always thinks."""

    question: str
    image: Image.Image | Path
    answer: str
    reasoning: str
    source: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A rendered image, and what stands in each of its cells, row by row: "7", "red circle", "bar 3" or ""."""

    image: Image.Image
    cells: tuple[str, ...]


def background(rng: random.Random) -> tuple[int, int, int]:
    """A pale colour, as behind easy-vqa's shapes."""
    return rng.randint(230, 255), rng.randint(230, 255), rng.randint(230, 255)
