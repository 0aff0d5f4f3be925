"""Thinking ratios from result files, as lmms-eval 0.7.3 and VLMEvalKit 0.0.20 write them."""

import csv
import json
import sys

import pytest

from metis_home.errors import DataError
from metis_home.training.evaluation.completions import CompletionFile
from metis_home.training.evaluation.kit import answer_digest
from metis_home.training.evaluation.think_ratio import TableError, think_ratios
from tests.training.evaluation.material import completion

THOUGHT, DIRECT = "<think>2 and 2</think><answer>4</answer>", "<think></think><answer>4</answer>"


def lines(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def samples(tmp_path):
    """lmms-eval drops `resps` where stripping the thought changed nothing."""
    path = tmp_path / "20261121_151936_samples_mmmu_val.jsonl"
    rows = [
        {"doc_id": 0, "resps": [THOUGHT], "filtered_resps": ["<answer>4</answer>"], "acc": {"subject": "Math"}},
        {"doc_id": 1, "resps": DIRECT, "filtered_resps": "<answer>4</answer>", "acc": {"subject": "Math"}},
        {"doc_id": 2, "filtered_resps": ["4"], "acc": {"subject": "Art"}},
        {"doc_id": 3, "filtered_resps": ["<think>cut in the middle"], "acc": {"subject": "Art"}},
    ]
    for row in rows:
        row["token_counts"] = [{"input_tokens": 600, "output_tokens": 10 * (row["doc_id"] + 1)}]
    lines(path, rows)
    return path


def test_thoughts_are_found_in_the_raw_answers_of_lmms_eval(samples) -> None:
    whole, art, math = think_ratios(samples, by="acc.subject")

    assert (whole.benchmark, whole.subject) == ("mmmu_val", "all")
    assert (whole.thinking.hits, whole.thinking.total) == (2, 4)
    assert (art.subject, art.thinking.hits, math.subject, math.thinking.hits) == ("Art", 1, "Math", 1)
    assert whole.mean_tokens == 25
    assert whole.mean_probability is None


def test_a_sidecar_tells_the_branch_whatever_the_text_says(samples, tmp_path) -> None:
    sidecar = tmp_path / "router.jsonl"
    row = {"task": "mmmu_val", "branch": "thinking", "thinking_probability": 0.8, "tokens": 7}
    lines(
        sidecar,
        [
            {**row, "doc_id": 1},
            {**row, "doc_id": 2, "branch": "non-thinking", "thinking_probability": 0.2},
            {**row, "doc_id": 0, "branch": "non-thinking", "thinking_probability": 0.2},
            {**row, "doc_id": 0},  # run again: the last one counts
            {**row, "doc_id": 3, "task": "other_task", "branch": "non-thinking"},
        ],
    )

    (whole,) = think_ratios(samples, sidecar=[sidecar])

    assert whole.thinking.hits == 3  # 0 and 1 by the sidecar, 3 by its text
    assert whole.unmatched == 1
    assert whole.mean_probability == pytest.approx((0.8 + 0.8 + 0.2) / 3)


COLUMNS = ("index", "question", "category", "prediction", "thinking")
TABLE = [(0, "a?", "colour", "4", "2 and 2"), (1, "b?", "colour", "4", ""), (2, "c?", "shape", THOUGHT, "")]


def write_table(path) -> None:
    if path.suffix == ".xlsx":
        openpyxl = pytest.importorskip("openpyxl", reason="writes .xlsx files, which no extra of this package brings")
        book = openpyxl.Workbook()
        for row in (COLUMNS, *TABLE):
            book.active.append(row)
        book.save(path)
        return
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows((COLUMNS, *TABLE))


@pytest.mark.parametrize("suffix", [".xlsx", ".tsv", ".csv"])
def test_the_thinking_column_of_vlmevalkit_is_what_counts(tmp_path, suffix) -> None:
    write_table(tmp_path / f"Metis_MMStar{suffix}")

    whole, colour, shape = think_ratios(tmp_path / f"Metis_MMStar{suffix}")

    assert whole.benchmark == "Metis_MMStar"
    assert (whole.thinking.hits, whole.thinking.total) == (1, 3)  # the column is there, so the text is not asked
    assert (colour.subject, colour.thinking.hits, shape.thinking.hits) == ("category" and "colour", 1, 0)


def test_without_a_thinking_column_the_prediction_is_read(tmp_path) -> None:
    (tmp_path / "M_D.json").write_text(
        json.dumps([{"index": 0, "prediction": THOUGHT}, {"index": 1, "prediction": DIRECT}])
    )

    (whole,) = think_ratios(tmp_path / "M_D.json")

    assert whole.thinking.hits == 1


def test_a_sidecar_without_row_numbers_is_matched_by_the_answers(tmp_path) -> None:
    write_table(tmp_path / "M_D.tsv")
    sidecar = tmp_path / "router.jsonl"
    logged = {"task": "D", "branch": "thinking", "thinking_probability": 0.75, "tokens": 9}
    lines(sidecar, [{**logged, "digest": answer_digest(text)} for text in ("<think>2 and 2</think>\n4", THOUGHT)])

    whole, *_ = think_ratios(tmp_path / "M_D.tsv", sidecar=[sidecar])

    assert whole.thinking.hits == 2
    assert whole.unmatched == 1
    assert whole.mean_probability == 0.75


def test_our_own_completions_are_read_too(tmp_path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    CompletionFile(directory).append(
        [
            completion("a", "auto", branch="thinking", source="x", prefix_tokens=2),
            completion("b", "auto", branch="non-thinking", reasoning="mentions <think>", source="y"),
        ]
    )

    whole, x, y = think_ratios(directory / "completions.jsonl")

    assert (whole.benchmark, whole.thinking.hits, x.thinking.hits, y.thinking.hits) == ("run", 1, 1, 0)
    assert (whole.mean_tokens, whole.mean_probability) == (11, 0.5)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.jsonl", None, "no such file"),
        ("empty.jsonl", "\n", "holds no rows"),
        ("bad.jsonl", "{", "not JSON"),
        ("list.jsonl", "[1]", "expected an object"),
        ("map.json", "{}", "list of rows"),
        ("x.pkl", "x", "expected .jsonl, .json"),
        ("none.jsonl", '{"doc_id": 1}\n', "no answer found"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, name, text, message) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)

    with pytest.raises(DataError, match=message):
        think_ratios(tmp_path / name)


def test_an_unknown_column_is_named(samples) -> None:
    with pytest.raises(DataError, match="no column 'acc.level'; found doc_id"):
        think_ratios(samples, by="acc.level")


def test_a_missing_library_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "M_D.xlsx").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pandas", None)

    with pytest.raises(TableError, match=r"metis_home\[train\]"):
        think_ratios(tmp_path / "M_D.xlsx")
