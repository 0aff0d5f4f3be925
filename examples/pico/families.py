"""The two families as data sets on disk: JSONL rows beside their PNG images.

direct      one object: easy-vqa (real), counting its one shape, a printed number or word, one bar
reasoning   several objects: counting and finding shapes, arithmetic, bar charts; exact answers, short derivations

    from pico.families import write_families
"""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from metis_home.training.data.records import write_rows

from . import amounts, shapes
from .query import Query
from .wording import wrap

Family = Literal["direct", "reasoning"]
Part = Literal["dense", "sft", "rl", "test", "templates"]
MODE_OF: dict[str, str] = {"direct": "non_thinking", "reasoning": "thinking"}

# A family is a mix of sources, by weight.
DIRECT = {"easy-vqa": 40, "count-one": 20, "read-number": 20, "read-bar": 12, "read-word": 8}
REASONING = {"count-several": 40, "arithmetic": 30, "chart": 30}
FAMILY_OF = {source: family for family, mix in (("direct", DIRECT), ("reasoning", REASONING)) for source in mix}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Rows per family of each part."""

    dense: int = 8000
    sft: int = 4000
    test: int = 600
    templates: int = 300


def queries(family: Family, count: int, *, part: Part, seed: int = 0) -> list[Query]:
    """`count` queries of a family, the same ones for the same arguments; no part shares a renderer seed with another.

    Training parts take easy-vqa's training images, the others its test images; only `templates` has held-out templates.
    """
    rng = random.Random(f"{family}/{part}/{seed}")
    split: shapes.Split = "train" if part in ("dense", "sft", "rl") else "test"
    mix = DIRECT if family == "direct" else REASONING
    make: dict[str, Callable[[], Query]] = {
        "easy-vqa": lambda: shapes.easy_vqa(split, rng),
        "count-one": lambda: shapes.count_one(split, rng),
        "count-several": lambda: shapes.several(rng),
        "read-number": lambda: amounts.number(rng),
        "read-word": lambda: amounts.word(rng),
        "read-bar": lambda: amounts.one_bar(rng),
        "arithmetic": lambda: amounts.expression(rng),
        "chart": lambda: amounts.bars(rng),
    }
    return [make[source]() for source in rng.choices(list(mix), list(mix.values()), k=count)]


def write_families(folder: Path, sizes: Sizes, *, seed: int = 0) -> None:
    """Write the parts under `folder`, which then appears at once: <part>.jsonl and images/<part>/*.png.

    `dense` is what the always-thinking dense model learns: both families with reasoning. `sft` is Stage-SFT's set:
    reasoning queries with thought, direct ones without. `test` and `templates` are held out.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for part in ("dense", "sft", "test", "templates"):
        write_part(partial, part, getattr(sizes, part), seed=seed)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def write_part(folder: Path, part: Part, rows_per_family: int, *, seed: int = 0) -> None:
    """Write one part: folder/<part>.jsonl and its images. `rl` has prompts and answers for Stage-RL, and no modes."""
    rng = random.Random(f"wording/{part}/{seed}")
    rows: list[dict[str, str]] = []
    families: tuple[Family, ...] = ("direct", "reasoning")
    for family in families:
        for query in queries(family, rows_per_family, part=part, seed=seed):
            rows.append(_row(query, f"{part}-{len(rows):05d}", part, folder, rng))
    rng.shuffle(rows)
    write_rows(folder / f"{part}.jsonl", rows)


def _row(query: Query, name: str, part: str, folder: Path, rng: random.Random) -> dict[str, str]:
    family = FAMILY_OF[query.source]
    image = Path("images") / part / f"{name}.png"
    (folder / image).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(query.image, Image.Image):
        query.image.save(folder / image)
    else:
        shutil.copyfile(query.image, folder / image)
    kind = "integer" if query.answer.isdigit() else "boolean" if query.answer in ("yes", "no") else "text"
    row = {
        "id": name,
        "prompt": wrap(query.question, rng, held_out=part == "templates"),
        "image": str(image),
        "answer": query.answer,
        "kind": kind,
        "source": query.source,
        "family": family,
        "derivation": query.reasoning,
    }
    if part != "rl":
        row["mode"] = "thinking" if part == "dense" else MODE_OF[family]
        if row["mode"] == "thinking":
            row["reasoning"] = query.reasoning
    return row
