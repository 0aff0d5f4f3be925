"""The completions file: grows line by line, survives a kill, and is not mixed with another run."""

import json

import pytest

from metis_home.errors import OutputError
from metis_home.training.evaluation.completions import CompletionFile, check_rows, open_run
from tests.training.evaluation.material import completion

MODEL = {"architecture": "metis_home", "fingerprint": "aa"}
SETTINGS = {"max_new_tokens": 8, "threshold": 0.5, "eos_token_id": (1, 2)}


def opened(directory, *, model=MODEL, settings=SETTINGS, modes=("auto",), overwrite=False) -> CompletionFile:
    return open_run(directory, model, settings, modes, overwrite=overwrite)


def test_what_was_written_is_read_again(tmp_path) -> None:
    opened(tmp_path).append([completion("a"), completion("b", correct=None, gold=None, images=["ü.png"])])

    again = opened(tmp_path)

    assert again.rows == {
        ("on", "a"): completion("a"),
        ("on", "b"): completion("b", correct=None, gold=None, images=["ü.png"]),
    }


@pytest.mark.parametrize("rest", ['{"id": "c"', '{"id": "ü', "\x00"])
def test_a_line_that_a_kill_left_unfinished_is_cut_off(tmp_path, rest) -> None:
    opened(tmp_path).append([completion("a")])
    with (tmp_path / "completions.jsonl").open("ab") as file:
        file.write(rest.encode()[:-1] or b"x")

    again = opened(tmp_path)
    again.append([completion("b")])

    assert [id for _, id in again.rows] == ["a", "b"]
    assert len((tmp_path / "completions.jsonl").read_text().splitlines()) == 2
    assert opened(tmp_path).rows == again.rows


@pytest.mark.parametrize("line", ["not json", "[]", '{"id": "a", "surprise": 1}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line) -> None:
    opened(tmp_path).append([completion("a")])
    path = tmp_path / "completions.jsonl"
    path.write_text(path.read_text() + line + "\n" + path.read_text())

    with pytest.raises(OutputError, match=r"completions.jsonl:2: not a completion"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": {**SETTINGS, "max_new_tokens": 9}}, "settings.max_new_tokens: 8 there, 9 now"),
        ({"settings": {**SETTINGS, "threshold": 0.6}}, "settings.threshold: 0.5 there, 0.6 now"),
        ({"model": {**MODEL, "fingerprint": "bb"}}, "model.fingerprint: aa there, bb now"),
        ({"settings": {**SETTINGS, "seed": 1}}, "settings.seed: None there, 1 now"),
    ],
)
def test_another_model_or_setting_is_refused_by_name(tmp_path, change, named) -> None:
    opened(tmp_path).append([completion("a", "auto")])

    with pytest.raises(OutputError, match=named.replace(".", r"\.") + ".*--overwrite"):
        opened(tmp_path, **change)

    assert opened(tmp_path).rows  # and nothing was lost


def test_a_run_without_answers_may_be_changed(tmp_path) -> None:
    opened(tmp_path)

    opened(tmp_path, model={**MODEL, "fingerprint": "bb"}).append([completion("a")])

    assert json.loads((tmp_path / "run.json").read_text())["model"]["fingerprint"] == "bb"


def test_the_threshold_does_not_matter_to_forced_answers(tmp_path) -> None:
    opened(tmp_path, modes=("on",)).append([completion("a", "on")])

    other = {**SETTINGS, "threshold": 0.6}

    assert opened(tmp_path, settings=other, modes=("auto",)).rows.keys() == {("on", "a")}


def test_routed_answers_of_another_threshold_are_kept_and_marked(tmp_path) -> None:
    opened(tmp_path).append([completion("a", "auto")])

    other = opened(tmp_path, settings={**SETTINGS, "threshold": 0.6}, modes=("on",))

    assert other.old_threshold
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["threshold"] == 0.5
    assert not opened(tmp_path).old_threshold


def test_overwriting_removes_what_a_run_writes_and_nothing_else(tmp_path) -> None:
    opened(tmp_path).append([completion("a", "auto")])
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")

    fresh = opened(tmp_path, model={**MODEL, "fingerprint": "bb"}, overwrite=True)

    assert fresh.rows == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "run.json"]


def test_results_without_a_run_file_are_not_touched(tmp_path) -> None:
    (tmp_path / "report.json").write_text("{}")

    with pytest.raises(OutputError, match=r"holds report.json but no run.json"):
        opened(tmp_path)


def test_changed_and_lost_rows_are_named(tmp_path) -> None:
    file = opened(tmp_path)
    file.append([completion("a"), completion("b"), completion("c")])

    check_rows(file, {"a": "r", "b": "r", "c": "r", "d": "new"})
    with pytest.raises(OutputError, match=r"1 rows changed \(b\); 1 rows gone \(c\)"):
        check_rows(file, {"a": "r", "b": "other"})
