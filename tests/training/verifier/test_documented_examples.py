"""The table of examples in docs/rewards.md says what the code does."""

import re
from pathlib import Path

import pytest

from metis_home.training.verifier import KINDS, verify_answer

DOCUMENT = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text()
ROWS = re.findall(
    r"^\| `(.*?)` \| `(.*?)` \| (\w*) ?\| (right|wrong|none) \| (\w+) \|$",
    DOCUMENT.split("## Examples")[1],
    re.MULTILINE,
)


def test_there_are_examples_and_every_kind_is_documented() -> None:
    assert len(ROWS) >= 30
    assert set(KINDS) <= set(re.findall(r"^\| `(\w+)` \|", DOCUMENT, re.MULTILINE))


@pytest.mark.parametrize(("gold", "answer", "kind", "verdict", "method"), ROWS)
def test_a_documented_example_is_true(gold, answer, kind, verdict, method) -> None:
    found = verify_answer(answer, gold, kind or None)

    assert found.correct is {"right": True, "wrong": False, "none": None}[verdict]
    assert found.method == method
