"""Solved prompts are dropped, the others taught by the shortest own answer or by a verified expert."""

import json
from pathlib import Path

import pytest
from PIL import Image

from metis_home.errors import DataError
from metis_home.training.data.records import load_records
from metis_home.training.evaluation.fingerprint import question_fingerprint
from metis_home.training.pipeline.report import draw_histogram, report_lines
from metis_home.training.pipeline.sft_set import build_sft_set, never_solved, read_pass_rates

GOOD = "<think>3 and 4</think><answer>7</answer>"
LONG = "<think>3 and 4 make seven</think><answer>7</answer>"
BAD_FORMAT = "<think></think><answer>7</answer>"
WRONG = "<think>3 and 5</think><answer>8</answer>"


def completion(text: str, correct: bool | None, tokens: int) -> dict[str, object]:
    return {"text": text, "correct": correct, "tokens": tokens, "finished": True}


def line(name: str, *completions: dict[str, object]) -> dict[str, object]:
    judged = [item["correct"] for item in completions if item["correct"] is not None]
    rate = sum(judged) / len(judged) if judged else None
    question = question_fingerprint(prompts(name)[0])
    return {"id": name, "answer": "7", "question": question, "pass_rate": rate, "completions": list(completions)}


def prompts(*names: str, source: str = "sums") -> list:
    return load_records(
        [{"id": name, "prompt": f"What is {name}?", "solution": "7", "source": source} for name in names]
    )


def direct(*names: str) -> list:
    rows = [{"id": name, "prompt": f"Read {name}.", "answer": "stop", "mode": "non_thinking"} for name in names]
    return load_records(rows)


def written(path: Path) -> list[dict[str, object]]:
    return [json.loads(row) for row in path.read_text().splitlines()]


def rates_of(*lines: dict[str, object]) -> dict[str, dict[str, object]]:
    return {str(entry["id"]): entry for entry in lines}


def sampled(records: list, *lines: dict[str, object]) -> dict[str, dict[str, object]]:
    """The lines as if these very records had been asked."""
    asked = {record.id: question_fingerprint(record) for record in records}
    return rates_of(*({**entry, "question": asked[str(entry["id"])]} for entry in lines))


def test_each_case_of_the_pass_rate_is_treated_as_the_paper_says(tmp_path: Path) -> None:
    rates = rates_of(
        line("always", completion(GOOD, True, 9), completion(GOOD, True, 9)),
        line("sometimes", completion(LONG, True, 12), completion(WRONG, False, 9), completion(GOOD, True, 9)),
        line("never", completion(WRONG, False, 9)),
        line("unknown", completion(WRONG, None, 9)),
    )
    expert = {"never": [WRONG, GOOD], "always": [GOOD]}

    report = build_sft_set(
        prompts("always", "sometimes", "never", "unknown"), rates, tmp_path / "sft.jsonl", expert=expert
    )

    rows = {row["id"]: row for row in written(tmp_path / "sft.jsonl")}
    assert rows.keys() == {"sometimes", "never"}
    assert (rows["sometimes"]["response"], rows["sometimes"]["origin"]) == (GOOD, "self")  # the shortest correct one
    assert (rows["never"]["response"], rows["never"]["origin"]) == (GOOD, "expert")
    assert (report.solved, report.sometimes, report.never, report.unjudged) == (1, 1, 1, 1)
    assert report.histogram == [1, *[0] * 6, 1, *[0] * 3, 1]  # p = 0, 2/3, 1
    assert all(row["mode"] == "thinking" for row in rows.values())


def test_the_rows_are_rows_that_can_be_trained(tmp_path: Path) -> None:
    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    (tmp_path / "in").mkdir()
    records = load_records(
        [{"id": "a", "prompt": "What?", "image": str(tmp_path / "red.png"), "solution": "7", "kind": "integer"}]
    )

    rates = sampled(records, line("a", completion(GOOD, True, 9), completion(WRONG, False, 9)))

    build_sft_set(records, rates, tmp_path / "in/s.jsonl")

    (record,) = load_records(tmp_path / "in/s.jsonl")
    assert record.response == GOOD
    assert (record.answer, record.kind) == ("7", "integer")
    assert Path(record.messages[0]["content"][0]["image"]).resolve() == tmp_path / "red.png"
    assert written(tmp_path / "in/s.jsonl")[0]["messages"][0]["content"][0]["image"] == "../red.png"


def test_images_in_memory_are_written_beside_the_rows_once(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 30), "blue")
    records = load_records([{"id": name, "prompt": f"{name}?", "image": image, "solution": "7"} for name in "ab"])
    rates = sampled(records, *(line(name, completion(GOOD, True, 9), completion(WRONG, False, 9)) for name in "ab"))

    build_sft_set(records, rates, tmp_path / "sft.jsonl")

    assert len(list((tmp_path / "images").iterdir())) == 1
    assert len(load_records(tmp_path / "sft.jsonl")) == 2


def test_all_distinct_answers_can_be_kept(tmp_path: Path) -> None:
    same = "<think>3  and 4</think><answer>7</answer>"  # but for white space
    answers = [completion(text, True, len(text)) for text in (GOOD, same, LONG, BAD_FORMAT)]
    rates = rates_of(line("a", *answers, completion(WRONG, False, 9)))

    report = build_sft_set(prompts("a"), rates, tmp_path / "sft.jsonl", pick="all")

    assert {row["id"]: row["response"] for row in written(tmp_path / "sft.jsonl")} == {"a#0": GOOD, "a#1": LONG}
    assert (report.duplicates, report.badly_formatted) == (1, 1)


def test_an_expert_is_verified_like_the_model(tmp_path: Path) -> None:
    rates = rates_of(*(line(name, completion(WRONG, False, 9)) for name in ("wrong", "bare", "silent", "right")))
    expert = {"wrong": [WRONG], "bare": ["7"], "right": [GOOD]}

    report = build_sft_set(prompts("wrong", "bare", "silent", "right"), rates, tmp_path / "sft.jsonl", expert=expert)

    assert [row["id"] for row in written(tmp_path / "sft.jsonl")] == ["right"]
    assert (report.expert_wrong, report.expert_badly_formatted, report.expert_missing) == (1, 1, 1)
    assert any(
        text.strip() == "1 p = 0 with correct expert answers in a wrong format only" for text in report_lines(report)
    )


def test_non_thinking_rows_are_mixed_in_by_ratio(tmp_path: Path) -> None:
    rates = rates_of(*(line(name, completion(GOOD, True, 9), completion(WRONG, False, 9)) for name in "abcd"))

    report = build_sft_set(prompts(*"abcd"), rates, tmp_path / "sft.jsonl", non_thinking=direct(*"uvwxyz"), ratio=0.5)

    origins = [row["origin"] for row in written(tmp_path / "sft.jsonl")]
    assert (origins.count("self"), origins.count("direct"), report.rows) == (4, 2, 6)


def test_held_out_questions_are_never_taught(tmp_path: Path) -> None:
    rates = rates_of(*(line(name, completion(GOOD, True, 9), completion(WRONG, False, 9)) for name in "ab"))
    held_out = load_records([{"prompt": "What is  A?", "solution": "7"}, {"prompt": "Read u.", "solution": "x"}])

    report = build_sft_set(
        prompts("a", "b"), rates, tmp_path / "sft.jsonl", non_thinking=direct("u", "v"), exclude=held_out
    )

    assert {row["id"] for row in written(tmp_path / "sft.jsonl")} == {"b", "v"}
    assert report.held_out == 2


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    rates = rates_of(*(line(name, completion(GOOD, True, 9), completion(WRONG, False, 9)) for name in "abcdef"))

    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        build_sft_set(prompts(*"abcdef"), rates, tmp_path / name, non_thinking=direct(*"uvwxyz"), ratio=0.5, seed=seed)

    one, two, three = ((tmp_path / name).read_bytes() for name in ("one", "two", "three"))
    assert one == two
    assert one != three


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 2 rows have no pass rate, the first is 'b'"):
        build_sft_set(prompts("a", "b"), rates_of(line("a", completion(GOOD, True, 1))), tmp_path / "sft.jsonl")
    with pytest.raises(DataError, match="no row is left: 1 solved"):
        build_sft_set(prompts("a"), rates_of(line("a", completion(GOOD, True, 1))), tmp_path / "sft.jsonl")
    with pytest.raises(DataError, match="non-thinking row 0"):
        build_sft_set(
            prompts("a"), rates_of(line("a", completion(GOOD, True, 1))), tmp_path / "s", non_thinking=prompts("u")
        )
    assert not (tmp_path / "sft.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pass_rate": "high"}, "pass_rate must be a number from 0 to 1, or null; found 'high'"),
        ({"pass_rate": 2}, "pass_rate must be"),
        ({"pass_rate": True}, "pass_rate must be"),
        ({"completions": ["7"]}, "completions must be"),
        ({"completions": None}, "completions must be"),
        ({"id": 3}, "id must be a text"),
    ],
)
def test_lines_that_are_no_pass_rates_are_named(tmp_path: Path, change: dict, words: str) -> None:
    good = line("a", completion(GOOD, True, 1))
    lines = [good, {**good, "id": "c", **change}]
    (tmp_path / "rates.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))

    with pytest.raises(DataError, match=rf"rates\.jsonl, line 2: {words}"):
        read_pass_rates([tmp_path / "rates.jsonl"])


def test_pass_rates_given_twice_and_ids_that_occur_twice_are_told_apart(tmp_path: Path) -> None:
    text = json.dumps(line("a", completion(GOOD, True, 1))) + "\n"
    (tmp_path / "once.jsonl").write_text(text)
    (tmp_path / "twice.jsonl").write_text(text * 2)
    (tmp_path / "other.jsonl").write_text('{"id": "a"}\n')

    with pytest.raises(DataError, match="in another file already. Pass each file once"):
        read_pass_rates([tmp_path / "once.jsonl"] * 2)
    with pytest.raises(DataError, match="lines 1 and 2 both have the id 'a'"):
        read_pass_rates([tmp_path / "twice.jsonl"])
    with pytest.raises(DataError, match="it lacks answer, question, pass_rate, completions. This is no file of pass"):
        read_pass_rates([tmp_path / "other.jsonl"])


def test_rows_without_a_pass_rate_are_left_out_only_where_that_is_allowed(tmp_path: Path) -> None:
    rates = rates_of(line("a", completion(GOOD, True, 9), completion(WRONG, False, 9)))

    report = build_sft_set(prompts("a", "b"), rates, tmp_path / "sft.jsonl", partial=True)

    assert [row["id"] for row in written(tmp_path / "sft.jsonl")] == ["a"]
    assert (report.prompts, report.without_rate) == (2, 1)
    assert any(text.strip() == "1 prompts without a pass rate, left out" for text in report_lines(report))
    for refused in (build_sft_set, never_solved):
        arguments = (tmp_path / "none.jsonl",) if refused is build_sft_set else ()
        with pytest.raises(DataError, match="1 of 2 rows have no pass rate, .*--partial leaves them out"):
            refused(prompts("a", "b"), rates, *arguments)
        with pytest.raises(
            DataError, match=r"2 of 2 rows have no pass rate, the first is 'x'\. .* from a part of it\?$"
        ):
            refused(prompts("x", "y"), rates, *arguments, partial=True)
    assert not (tmp_path / "none.jsonl").exists()


def test_answers_to_another_row_of_the_same_id_are_not_taught(tmp_path: Path) -> None:
    rates = rates_of(line("a", completion(GOOD, True, 9), completion(WRONG, False, 9)))
    row = {"id": "a", "prompt": "What is a?", "solution": "7", "source": "sums"}

    for change, what in (({"solution": "8"}, "gold"), ({"prompt": "What is A?"}, "question or image")):
        with pytest.raises(DataError, match=rf"1 of 1 rows have another {what} .* the first is row 0 \(a\)"):
            build_sft_set(load_records([{**row, **change}]), rates, tmp_path / "sft.jsonl")
    Image.new("RGB", (30, 30), "red").save(tmp_path / "a.png")
    records = load_records([{**row, "image": str(tmp_path / "a.png")}])
    rates = sampled(records, *rates.values())
    Image.new("RGB", (30, 30), "blue").save(tmp_path / "a.png")
    with pytest.raises(DataError, match="another question or image"):
        build_sft_set(records, rates, tmp_path / "sft.jsonl")


def test_an_image_that_is_gone_is_named_with_its_row(tmp_path: Path) -> None:
    rates = rates_of(line("a", completion(GOOD, True, 9), completion(WRONG, False, 9)))
    gone = {"id": "d", "prompt": "?", "answer": "7", "mode": "non_thinking", "image": str(tmp_path / "gone.png")}

    with pytest.raises(DataError, match=r"row 0 \(d\): the image .*gone\.png cannot be read: No such file"):
        build_sft_set(prompts("a"), rates, tmp_path / "sft.jsonl", non_thinking=load_records([gone]))


def test_the_expert_is_asked_only_about_what_was_never_solved() -> None:
    rates = rates_of(line("a", completion(GOOD, True, 1)), line("b", completion(WRONG, False, 1)))

    assert [record.id for record in never_solved(prompts("a", "b"), rates)] == ["b"]


def test_the_report_is_a_table_and_a_picture(tmp_path: Path) -> None:
    rates = rates_of(line("a", completion(GOOD, True, 9), completion(WRONG, False, 9)))
    report = build_sft_set(prompts("a"), rates, tmp_path / "sft.jsonl")

    draw_histogram(report, tmp_path / "rates.png")

    assert Image.open(tmp_path / "rates.png").size[0] > 500
    assert any(text.startswith("0 < p < 1") and "1 rows" in text for text in report_lines(report))
