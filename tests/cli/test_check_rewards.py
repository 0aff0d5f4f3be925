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
    {"answer": "3.14", "tolerance": 0.01}, {"answer": ["crimson", "red"]}, {"answer": "2x+1"}, {"answer": "0"},
    {"answer": r"x = \pm 2"}, {"answer": "-7 cm"}, {"answer": "cat", "kind": "text", "options": ["cat", "dog"]},
]  # fmt: skip


def test_good_golds_pass_and_wrong_answers_do_not(run, tmp_path) -> None:
    status, out, err = run(write(tmp_path, GOOD), "--json")

    report = json.loads(out)
    assert (status, err) == (0, "")
    assert report["rows"] == len(GOOD)
    assert report["golds"] == report["gold_scores_itself"] == len(GOOD) + 1  # one row has two
    assert report["wrong_answers_tried"] >= 4 * len(GOOD)
    assert report["wrong_answers_accepted"] == report["options_that_fail"] == 0
    assert report["methods"]["number"] == 7
    assert sum(report["methods"].values()) == len(GOOD) + 1


def test_golds_that_cannot_be_read_are_listed_and_fail(run, tmp_path) -> None:
    bad = [
        {"answer": r"\frac{"},
        {"answer": "4.5", "kind": "integer"},
        {"answer": "4", "kind": "nubmer"},
        {"answer": "9^{9^{9^9}}"},
    ]

    status, out, err = run(write(tmp_path, [*GOOD, *bad]))

    assert status == 1
    assert f"{len(GOOD) + 1} of {len(GOOD) + 5} golds score themselves" in out
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
    assert " of 11 wrong answers score" in out
    assert "\n0 of 11" not in out
    assert "a wrong answer scores: 'B': hedged" in err


def test_each_of_several_golds_is_read_and_scored(run, tmp_path) -> None:
    status, out, _ = run(write(tmp_path, [{"solution": ["4", r"\frac{", "four"]}]), "--json")

    report = json.loads(out)
    assert status == 1
    assert (report["golds"], report["gold_scores_itself"], report["unreadable_golds"]) == (3, 2, 1)
    assert report["examples"]["unreadable"][0]["gold"] == r"\frac{"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"answer": "A", "options": ["red", "blue"]}, "option 2"),
        ({"answer": "cat", "kind": "text", "options": ["cat", "dog"]}, "option 2"),
        ({"answer": "4"}, "negated"),
        ({"answer": "-4 cm"}, "negated"),
        ({"answer": "2x+1"}, "negated"),
        ({"answer": "yes"}, "denied"),
        ({"answer": "blue car"}, "denied"),
    ],
)
def test_wrong_answers_that_look_like_the_gold_are_tried(run, tmp_path, monkeypatch, row, what) -> None:
    from metis_home.training.verifier import verify_answer

    tried = []

    def listening(prediction, gold, *arguments, **options):
        tried.append(prediction)
        verdict = verify_answer(prediction, gold, *arguments, **options)
        looks_alike = ("blue", "dog", "-4", "4 cm", "-(2x+1)", "not yes", "not blue car")
        return dataclasses.replace(verdict, correct=True) if prediction[8:-9] in looks_alike else verdict

    monkeypatch.setattr("metis_home.training.judging.verify_answer", listening)
    status, _, err = run(write(tmp_path, [row]))

    assert status == 1
    assert f": {what}: <answer>" in err


@pytest.mark.parametrize("row", [{"answer": "0"}, {"answer": r"\pm 4"}, {"answer": "0.01", "tolerance": 0.05}])
def test_a_gold_that_is_its_own_negative_is_no_fault(run, tmp_path, row) -> None:
    status, _, err = run(write(tmp_path, [row]))

    assert (status, err) == (0, "")


@pytest.mark.parametrize("options", [["5", "5", "6"], ["B", "A", "C"], ["red", ""]])
def test_options_whose_text_does_not_choose_their_letter_are_listed_and_fail(run, tmp_path, options) -> None:
    status, _, err = run(write(tmp_path, [{"answer": "C" if len(options) == 3 else "A", "options": options}]))

    assert status == 1
    assert "row 0: the text of an option does not choose its letter (option " in err


@pytest.mark.parametrize("options", [{"A": "red", "B": "blue"}, "A. red B. blue", 2, ["red", ["blue"]]])
def test_options_of_another_type_are_listed_and_fail(run, tmp_path, options) -> None:
    status, _, err = run(write(tmp_path, [{"answer": "A", "options": options}]))

    assert status == 1
    assert "row 0: cannot be read: 'A': options " in err


def test_half_a_character_is_shown_escaped(run, tmp_path) -> None:
    row = {"answer": "A", "options": ["\ud800", "\ud800"], "id": "a\udc00"}

    _, out, _ = run(write(tmp_path, [row]), "--json")
    _, _, err = run(write(tmp_path, [row]))

    assert json.loads(out)["examples"]["options"][0]["id"] == "a\udc00"
    assert r"\ud800" in err
    with pytest.raises(DataError, match="half a character"):
        run(write(tmp_path, [{"answer": "\ud800"}]))


def test_an_empty_file_is_an_error(run, tmp_path) -> None:
    with pytest.raises(DataError, match="no rows"):
        run(write(tmp_path, []))


def test_the_command_file_imports_no_torch() -> None:
    source = "import sys, metis_home.cli.rewards; print('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", source], capture_output=True, text=True).stdout.strip() == "False"
