"""`metis-home check-rewards`: golds score themselves, or the command fails and says which do not."""

import dataclasses
import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from metis_home.cli import rewards
from metis_home.errors import DataError


@pytest.fixture
def run():
    """Call the command alone; returns (status, stdout, stderr)."""
    app = typer.Typer()
    rewards.add_commands(app)

    def call(*arguments: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, list(arguments))
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.stdout, done.stderr

    return call


def write(tmp_path, rows) -> str:
    path = tmp_path / "rl.jsonl"
    path.write_text("".join(json.dumps({"prompt": "q", **row}) + "\n" for row in rows))
    return str(path)


GOOD = [
    {"answer": "4"}, {"answer": "$12$"}, {"answer": r"\boxed{\frac{1}{2}}"}, {"answer": "B"}, {"answer": "yes"},
    {"answer": "blue car"}, {"answer": "10%", "kind": "percent"}, {"answer": r"\{1, 2\}"}, {"answer": "12:30"},
    {"answer": "red", "options": ["blue", "red"]}, {"answer": "a text", "solution": "3 cm"},
    {"answer": "3.14", "tolerance": 0.01},
]  # fmt: skip


def test_good_golds_pass_and_wrong_answers_do_not(run, tmp_path) -> None:
    status, out, err = run(write(tmp_path, GOOD), "--json")

    report = json.loads(out)
    assert (status, err) == (0, "")
    assert report["rows"] == report["gold_scores_itself"] == len(GOOD)
    assert report["wrong_answers_tried"] >= 3 * len(GOOD)
    assert report["wrong_answers_accepted"] == 0
    assert report["methods"]["number"] == 5
    assert sum(report["methods"].values()) == len(GOOD)


def test_golds_that_cannot_be_read_are_listed_and_fail(run, tmp_path) -> None:
    bad = [
        {"answer": r"\frac{"},
        {"answer": "4.5", "kind": "integer"},
        {"answer": "4", "kind": "nubmer"},
        {"answer": "9^{9^{9^9}}"},
    ]

    status, out, err = run(write(tmp_path, [*GOOD, *bad]))

    assert status == 1
    assert f"{len(GOOD)} of {len(GOOD) + 4} golds score themselves" in out
    assert f"row {len(GOOD)}: cannot be read: '\\\\frac{{'" in err
    assert "is not a whole number" in err
    assert "Did you mean 'number'" in err


def test_only_five_examples_are_shown(run, tmp_path) -> None:
    status, out, _ = run(write(tmp_path, [{"answer": r"\frac{"}] * 9), "--json")

    report = json.loads(out)
    assert status == 1
    assert report["unreadable_golds"] == 9
    assert len(report["examples"]["unreadable"]) == 5


def test_samples_can_be_left_out(run, tmp_path) -> None:
    _, out, _ = run(write(tmp_path, GOOD), "--samples", "0", "--json")

    assert json.loads(out)["wrong_answers_tried"] == 0


def test_a_wrong_answer_that_scores_fails(run, tmp_path, monkeypatch) -> None:
    from metis_home.training.verifier import verify_answer

    def generous(prediction, gold, *arguments, **options):
        """The bug of a known reward: the gold anywhere in the text is right."""
        verdict = verify_answer(prediction, gold, *arguments, **options)
        return verdict if gold not in prediction else dataclasses.replace(verdict, correct=True)

    monkeypatch.setattr("metis_home.training.judging.verify_answer", generous)
    status, out, err = run(write(tmp_path, [{"answer": "4"}, {"answer": "B"}]))

    assert status == 1
    assert " of 8 wrong answers score" in out
    assert "\n0 of 8" not in out
    assert "a wrong answer scores: 'B': hedged" in err


def test_an_empty_file_is_an_error(run, tmp_path) -> None:
    with pytest.raises(DataError, match="no rows"):
        run(write(tmp_path, []))


def test_the_command_file_imports_no_torch() -> None:
    source = "import sys, metis_home.cli.rewards; print('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", source], capture_output=True, text=True).stdout.strip() == "False"
