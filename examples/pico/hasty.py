"""Rows that teach a model to think about some questions and to answer others of the same kind at once.

Metis-RISE begins with RL because a model may possess a way to reason and apply it inconsistently. A pico model does not
come with such a history: these rows give it one. Part of the reasoning family's derivations is cut down to their
conclusion; the direct family keeps its own.
"""

import json
import os
import random
from pathlib import Path

from metis_home.training.data.records import write_rows


def write_hasty_rows(file: Path, rows: Path, share: float) -> int:
    """Copy the JSONL `rows` to `file`, with `share` of the reasoning rows' derivations reduced to "so ANSWER.".

    Returns:
        How many were.
    """
    rng = random.Random("hasty")
    file.parent.mkdir(parents=True, exist_ok=True)
    changed: list[dict[str, str]] = []
    hasty = 0
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        row["image"] = os.path.relpath(rows.parent / row["image"], file.parent)
        if row["family"] == "reasoning" and rng.random() < share:
            row["reasoning"] = f"so {row['answer']}."
            hasty += 1
        changed.append(row)
    write_rows(file, changed)
    return hasty
