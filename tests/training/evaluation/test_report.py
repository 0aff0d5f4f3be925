"""What a report adds up to: hand-counted."""

import json

import pytest

from metis_home.training.evaluation.completions import Completion
from metis_home.training.evaluation.report import (
    EvaluationReport,
    comparisons,
    group,
    mode_reports,
    router_reports,
    select,
)
from tests.training.evaluation.material import completion


def test_a_group_by_hand() -> None:
    found = group(
        [
            completion("a", completion_tokens=10, seconds=2.0),
            completion("b", completion_tokens=20, prefix_tokens=3, correct=False, finished=False),
            completion("c", completion_tokens=5, correct=None, branch="non-thinking", reasoning="", router_seconds=0.5),
        ]
    )

    assert (found.accuracy.hits, found.accuracy.total, found.unscored) == (1, 2, 1)
    assert (found.thinking.hits, found.thinking.total) == (2, 3)
    assert (found.reasoned.hits, found.finished.hits) == (2, 2)
    assert (found.tokens, found.mean_tokens) == (38, 38 / 3)
    assert found.tokens_per_correct == 33  # of the rows with a verdict
    assert (found.seconds, found.mean_seconds) == (4.5, 1.5)


def test_a_dense_model_has_no_thinking_ratio_but_a_share_of_reasoned_answers() -> None:
    found = group([completion("a", branch=None), completion("b", branch=None, reasoning="")])

    assert found.thinking is None
    assert found.reasoned.value == 0.5


def test_sources_are_averaged_plainly_beside_the_average_of_all_rows() -> None:
    rows = [
        completion("a", "auto", source="small", correct=False),
        *(completion(str(number), "auto", source="large") for number in range(3)),
        completion("x", "auto", source="unscored", correct=None),
    ]

    found = mode_reports(rows)["auto"]

    assert found.all.accuracy.value == 0.75
    assert found.mean_accuracy == 0.5  # (0 + 1) / 2; a source without verdicts has no accuracy
    assert list(found.sources) == ["small", "large", "unscored"]


def test_modes_come_in_one_order_and_absent_ones_not_at_all() -> None:
    assert list(mode_reports([completion("a", "off"), completion("a", "auto")])) == ["auto", "off"]


def test_the_router_is_judged_once_per_query_and_only_where_there_is_a_label() -> None:
    rows = [
        completion("a", "on", thinking_probability=0.9, label="thinking"),
        completion("a", "off", thinking_probability=0.9, label="thinking"),
        completion("b", "on", thinking_probability=0.6, label="non-thinking"),
        completion("c", "on", thinking_probability=0.2, label="non-thinking", source="charts"),
        completion("d", "on", thinking_probability=0.2, label=None),
    ]

    found = router_reports(rows, threshold=0.5)

    assert list(found) == ["reading", "charts", "all"]
    assert found["all"].confusion == ((1, 1), (0, 1))
    assert found["all"].accuracy.hits == 2
    assert found["all"].auc == 1.0
    assert found["all"].calibration_error == pytest.approx((0.1 + 0.6 + 0.2) / 3)


def test_a_probability_at_the_threshold_thinks_also_where_float32_rounds_it() -> None:
    just_below = 0.699999988079071  # the float32 nearest to 0.7, which the router compares with
    rows = [completion("a", thinking_probability=just_below, label="thinking")]

    assert router_reports(rows, threshold=0.7)["all"].accuracy.hits == 1


def test_auto_is_compared_with_each_forced_mode_on_the_same_rows() -> None:
    rows = [
        completion("a", "auto", completion_tokens=10, correct=True),
        completion("b", "auto", completion_tokens=2, correct=True),
        completion("c", "auto", completion_tokens=99),  # not answered in mode on
        completion("a", "on", completion_tokens=10, correct=True),
        completion("b", "on", completion_tokens=14, correct=False, seconds=3.0),
    ]

    (found,) = comparisons(rows)

    assert (found.against, found.source, found.rows) == ("on", "all", 2)
    assert found.tokens_saved == 0.5
    assert found.seconds_saved == 0.5
    assert found.accuracy.value == 0.5


def test_rows_without_two_verdicts_count_for_tokens_only() -> None:
    rows = [completion("a", "auto", correct=None, completion_tokens=5), completion("a", "off", completion_tokens=10)]

    (found,) = comparisons(rows)

    assert found.accuracy.value is None
    assert found.tokens_saved == 0.5


def a_report(rows: list[Completion]) -> EvaluationReport:
    return EvaluationReport(
        model={"name": "m", "routes": True},
        data={"name": "d"},
        settings={},
        environment={},
        modes=mode_reports(rows),
        router=router_reports(rows, 0.5),
        comparisons=comparisons(rows),
        completions=rows,
    )


def test_the_report_is_json_without_the_completions() -> None:
    report = a_report([completion("a", "auto", label="thinking"), completion("a", "on", label="thinking")])

    found = json.loads(json.dumps(report.to_dict()))

    assert "completions" not in found
    assert found["modes"]["auto"]["all"]["accuracy"]["value"] == 1.0
    assert found["router"]["all"]["confusion"] == [[0, 0], [0, 1]]
    assert found["comparisons"][0]["against"] == "on"


def test_completions_are_selected_in_the_order_of_the_rows() -> None:
    rows = {(row.thinking, row.id): row for row in (completion("b"), completion("a"), completion("c"))}

    assert [row.id for row in select(rows, ["a", "b"], ["auto", "on"])] == ["a", "b"]


def test_many_sources_are_rows_of_a_picture_that_keeps_its_width() -> None:
    from metis_home.training.evaluation.plots import modes_figure

    rows = [
        completion(f"q{source}", mode, source=f"source {source}", label="thinking")
        for source in range(8)
        for mode in ("auto", "on", "off")
    ]
    figure = modes_figure(a_report(rows))

    width, height = figure.get_size_inches()
    assert width / height < 2
    assert figure.axes[0].yaxis_inverted()  # the first source on top
    named = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert named == [*(f"source {number}" for number in range(8)), "all"]
    assert [len(axis.patches) for axis in figure.axes] == [27] * 3
