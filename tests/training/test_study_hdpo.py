"""The toy study of HDPO: its task, its judgement, and one tiny run from end to end. Learning is not tested here."""

import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def test_codes_of_the_test_are_in_no_training_row_and_only_told_questions_name_their_color() -> None:
    from pico.tool_task import COLORS, TaskSettings, rows

    train, test = (rows(TaskSettings(), part) for part in ("train", "test"))

    assert not {row.columns["code"] for row in train} & {row.columns["code"] for row in test}
    for row in [*train, *test]:
        question = str(row.messages[-1]["content"])
        named = [color for color in COLORS if f" {color}." in question]
        assert named == ([row.answer] if row.source == "told" else [])
    share = sum(row.source == "lookup" for row in test) / len(test)
    assert 0.2 < share < 0.4


def test_taught_trajectories_call_the_real_tool_and_supervise_the_policys_tokens_only() -> None:
    from pico.tool_task import StartSettings, TaskSettings, make_processor, rows, trajectories

    processor = make_processor()
    taught = trajectories(processor, rows(TaskSettings(train=60), "train"), StartSettings(), seed=0)

    calls = 0
    for ids, labels in taught:
        own = processor.tokenizer.decode([token for token in labels if token != -100])
        whole = processor.tokenizer.decode(ids)
        assert own.count("<answer>") == 1
        assert "tool_response" not in own
        assert ("<tool_response>" in whole) == ("<tool_call>" in own)
        calls += "<tool_call>" in own
    assert 45 < calls < 60


def test_the_goal_is_half_the_calls_at_equal_accuracy() -> None:
    from study_hdpo import Plan, judge

    def run(calls: float, accuracy: float) -> dict:
        arms = {"0": (1.0, 0.9), "0.15": (calls, accuracy)}
        tests = {name: {"calls_per_right_answer": c, "accuracy_all": a} for name, (c, a) in arms.items()}
        return {"seed": 0, "arms": {name: {"test": test} for name, test in tests.items()}}

    assert [goal["met"] for goal in judge(run(0.5, 0.9), Plan())] == [True, True]
    assert [goal["met"] for goal in judge(run(0.51, 0.91), Plan())] == [False, True]
    assert [goal["met"] for goal in judge(run(0.2, 0.89), Plan())] == [True, False]
    assert [goal["met"] for goal in judge(run(0.0, 0.0), Plan())] == [False, False]


def test_a_tiny_run_goes_through_and_is_not_repeated(tmp_path) -> None:
    from study_hdpo import draw, run_study, tiny_plan

    report = run_study(tmp_path / "study", tiny_plan())
    again = run_study(tmp_path / "study", tiny_plan())
    draw(report, tmp_path / "study.png")

    assert json.loads(json.dumps(again)) == json.loads(json.dumps(report))
    assert not report["passed"]  # nothing was learnt, so nothing can be halved
    [run] = report["seeds"]
    assert set(run["arms"]) == {"0", "0.15"}
    assert Image.open(tmp_path / "study.png").size[0] > 800


def test_the_committed_numbers_are_those_of_the_shipped_plan() -> None:
    from dataclasses import asdict

    from study_hdpo import Plan

    report = json.loads((ROOT / "benchmarks/results/study-hdpo.json").read_text())

    assert report["plan"] == json.loads(json.dumps(asdict(Plan())))
    assert report["passed"] == all(goal["met"] for goal in report["goals"])
    assert len(report["goals"]) == 6
