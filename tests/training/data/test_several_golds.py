"""Rows with several golds, any of which is right (VQA, DocVQA), on their way through everything that reads a gold."""

import json
from pathlib import Path

import numpy as np
import pytest

from metis_home import Branch
from metis_home.training.data.check import check_records
from metis_home.training.data.encode import Encoder
from metis_home.training.data.records import Record, load_records
from metis_home.training.evaluation.answering import Generated
from metis_home.training.evaluation.fingerprint import row_fingerprint
from metis_home.training.evaluation.run import _completion
from metis_home.training.judging import record_problem, verify_record
from metis_home.training.pipeline.pass_rates import _line, rows_digest
from metis_home.training.pipeline.sft_set import build_sft_set
from metis_home.training.rl.completions import CompletionsTable
from metis_home.training.rl.rl_buffer import Group
from metis_home.training.rl.scoring import Scorer
from metis_home.training.rollouts.types import Rollout, make_prompt
from tests.training.data.tiny_rows import tiny_processor

ROW = {"id": "q", "prompt": "Which colour?", "solution": ["crimson", "red"]}


def one(**columns: object) -> Record:
    [record] = load_records([{**ROW, **columns}])
    return record


@pytest.mark.parametrize(
    ("columns", "answer"),
    [
        ({}, ["crimson", "red"]),
        ({"solution": ("crimson", 4, 0.5)}, ["crimson", "4", "0.5"]),
        ({"solution": np.array(["crimson", "red"])}, ["crimson", "red"]),
        ({"solution": ["red", "red", "crimson", "red"]}, ["red", "crimson"]),  # ten annotators say the same twice
        ({"solution": ["red"]}, "red"),
        ({"solution": [], "answer": ["a", "b"]}, ["a", "b"]),
        ({"solution": float("nan"), "answer": "a"}, "a"),
        ({"solution": []}, None),
    ],
)
def test_a_list_is_read(columns, answer) -> None:
    record = one(**columns)

    assert record.answer == answer
    assert record.golds == (answer if isinstance(answer, list) else [] if answer is None else [answer])


def test_files_hold_them(tmp_path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW))
    parquet.write_table(pyarrow.Table.from_pylist([ROW]), tmp_path / "b.parquet")

    for name in ("a.jsonl", "b.parquet"):
        [record] = load_records(tmp_path / name)
        assert record.golds == ["crimson", "red"]


def test_a_response_is_made_of_the_first_one() -> None:
    assert one(answer=["2", "two"], mode="non_thinking").response == "<think></think><answer>2</answer>"
    assert one(answer=["2", "two"], reasoning="1 + 1").response == "<think>1 + 1</think><answer>2</answer>"


@pytest.mark.parametrize(
    ("answer", "correct"), [("red", True), ("Crimson", True), ("blue", False), ("red or blue", False)]
)
def test_any_of_them_is_right(answer, correct) -> None:
    assert verify_record(f"<answer>{answer}</answer>", one()).correct is correct


def test_each_of_them_is_checked() -> None:
    bad = one(solution=["red", r"\frac{", "crimson"])

    assert record_problem(one()) is None
    assert record_problem(bad).startswith(r"gold 2 of 3, '\\frac{': ")
    assert [problem.reason for problem in check_records([one(), bad], purpose="rl").problems][:1] == [
        "unparseable gold"
    ]
    assert record_problem(one(solution=["red", ""])) == "gold 2 of 2, '': is empty"


def a_rollout(record: Record, text: str) -> Rollout:
    prompt = make_prompt(record, Encoder(tiny_processor(), system_prompt=None), index=0)
    return Rollout(prompt=prompt, text=text, completion_ids=[1], logprobs=[-1.0], loss_mask=[1], branch=1)


def test_rewards_and_the_table_of_completions_get_them(tmp_path: Path) -> None:
    rollouts = [a_rollout(one(), f"<think>r</think><answer>{word}</answer>") for word in ("red", "blue")]

    [scores] = Scorer(["accuracy_reward"]).score([rollouts])
    table = CompletionsTable(tmp_path, rank=0)
    table.write([Group(rollouts=rollouts, scores=scores, is_informative=True)], step=1)

    assert scores.total == [1.0, 0.0]
    assert [json.loads(line)["gold"] for line in table.path.read_text().splitlines()] == [["crimson", "red"]] * 2


def test_pass_rates_and_the_rows_of_stage_sft_keep_them(tmp_path: Path) -> None:
    record = one()
    wrong, right = "<think>r</think><answer>blue</answer>", "<think>r</think><answer>red</answer>"

    rates = json.loads(json.dumps(_line(record, [a_rollout(record, wrong)], verify_record)))
    report = build_sft_set([record], {"q": rates}, tmp_path / "sft.jsonl", expert={"q": [wrong, right]})
    [row] = load_records(tmp_path / "sft.jsonl")

    assert (rates["answer"], rates["pass_rate"], report.expert) == (["crimson", "red"], 0.0, 1)
    assert (row.answer, row.response, row.mode) == (["crimson", "red"], right, Branch.THINKING)
    assert check_records([row], purpose="sft").problems == []


def test_what_tells_rows_apart_sees_every_one() -> None:
    others = [one(), one(solution=["crimson", "blue"]), one(solution="crimson")]

    assert len({row_fingerprint(record) for record in others}) == 3
    assert len({rows_digest([record]) for record in others}) == 3


def test_an_evaluation_shows_them_in_one_line(tmp_path: Path) -> None:
    made = Generated(
        position=0,
        branch=None,
        prefix="",
        text="<think></think><answer>red</answer>",
        prompt_tokens=1,
        prefix_tokens=0,
        completion_tokens=1,
        finished=True,
        seconds=0.0,
    )

    shown = _completion(one(), "auto", made, {"q": "x"}, None, 0.0, tmp_path)

    assert (shown.gold, shown.correct) == ("crimson or red", True)
