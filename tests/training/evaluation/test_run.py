"""`evaluate` on a tiny real model: the answers are those of `answer`, and a run goes on where it stopped."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from metis_home.chat import answer
from metis_home.errors import BranchError, DataError, OutputError
from metis_home.training.data.encode import Encoder
from metis_home.training.data.records import load_records
from metis_home.training.evaluation import evaluate
from metis_home.training.evaluation.answering import Answerer, _with_prefix
from metis_home.training.evaluation.run import check_modes
from tests.training.evaluation.material import SHORT, pictures, records, rows

THINKING = {"auto": "auto", "on": True, "off": False}


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return records(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def middle(loaded, asked) -> float:
    """A threshold with half of the queries on each side."""
    answerer = Answerer(*loaded, system_prompt="")
    (window,) = answerer.windows(asked)
    probabilities = sorted(routing.thinking_probability for routing in answerer.route(window))
    return (probabilities[2] + probabilities[3]) / 2


@pytest.fixture(scope="module")
def report(loaded, asked, middle, tmp_path_factory):
    """One run of all modes; tests only read it."""
    directory = tmp_path_factory.mktemp("run")
    return evaluate(
        *loaded, asked, thinking=("auto", "on", "off"), out_dir=directory, threshold=middle, **SHORT
    ), directory


@pytest.fixture
def generated(loaded, monkeypatch):
    """Counts the rows that the model generates, and can stop it after some batches."""
    model = loaded[0]
    original, counted = model.generate, {"rows": 0, "batches": 0, "stop_after": None}

    def counting(**inputs):
        if counted["stop_after"] == counted["batches"]:
            raise KeyboardInterrupt
        counted["batches"] += 1
        counted["rows"] += inputs["input_ids"].shape[0]
        return original(**inputs)

    monkeypatch.setattr(model, "generate", counting)
    return counted


# ---- the answers ----------------------------------------------------------------------------------------------------


def test_every_answer_is_the_one_that_the_query_alone_gets(report, loaded, asked, middle) -> None:
    found, _ = report
    by_id = {record.id: record for record in asked}

    assert Counter(row.thinking for row in found.completions) == {"auto": 6, "on": 6, "off": 6}
    for row in found.completions:
        alone = answer(
            *loaded,
            by_id[row.id].messages,
            thinking=THINKING[row.thinking],
            router_threshold=middle,
            max_new_tokens=6,
            do_sample=False,
        )
        assert row.completion == alone.text
        assert (row.branch, row.finished) == (alone.branch.label, alone.finished)
        assert (row.reasoning, row.content) == (alone.reasoning_content, alone.content)
        assert row.completion_tokens == alone.completion_tokens
        assert row.prompt_tokens + row.prefix_tokens == alone.prompt_tokens
        if row.thinking == "auto":
            assert row.thinking_probability == pytest.approx(alone.thinking_probability, abs=1e-6)


def test_auto_takes_both_branches_and_forced_modes_one(report) -> None:
    found, _ = report
    branches = {
        mode: Counter(r.branch for r in found.completions if r.thinking == mode) for mode in ("auto", "on", "off")
    }

    assert branches == {
        "auto": {"thinking": 3, "non-thinking": 3},
        "on": {"thinking": 6},
        "off": {"non-thinking": 6},
    }
    assert found.modes["auto"].all.thinking.value == 0.5


def test_a_prompt_with_a_prefix_is_the_encoders(loaded, asked) -> None:
    encoder = Encoder(loaded[1], system_prompt=None)

    for forced, prefix in ((True, "<think>"), (False, "<think></think>")):
        want = encoder.prompt(asked[1], forced)
        got = _with_prefix(encoder.prompt(asked[1]), encoder.tokens(prefix))
        assert (got.input_ids, got.labels, got.mm_token_type_ids) == (
            want.input_ids,
            want.labels,
            want.mm_token_type_ids,
        )


def test_an_answer_ends_with_its_end_token_and_padding_is_no_answer(loaded) -> None:
    answerer = Answerer(*loaded)
    (end,) = answerer._end_ids

    assert answerer._cut([5, end, end, 7]) == ([5, end], True)
    assert answerer._cut([5, 6]) == ([5, 6], False)


def test_a_model_in_training_mode_stays_in_it(loaded, asked, tmp_path) -> None:
    model, processor = loaded
    model.train()
    try:
        evaluate(model, processor, asked[:1], out_dir=tmp_path, **SHORT)
        assert model.training
    finally:
        model.eval()


def test_verdicts_are_the_verifiers_and_rows_without_gold_count_apart(loaded, asked, tmp_path) -> None:
    from metis_home.training.verifier import verify_answer

    without = [replace(asked[0], answer=None), *asked[1:3]]

    found = evaluate(*loaded, without, thinking="off", out_dir=tmp_path, **SHORT)

    assert found.completions[0].correct is None
    assert found.modes["off"].all.unscored == 1 + sum(row.correct is None for row in found.completions[1:])
    for row in found.completions[1:]:
        assert row.correct == verify_answer(row.prefix + row.completion, row.gold, row.kind).correct
    assert any("no verdict" in note for note in found.notes)


# ---- what a run writes ----------------------------------------------------------------------------------------------


def test_a_report_says_what_it_was_made_with(report) -> None:
    found, directory = report
    written = json.loads((directory / "report.json").read_text())

    assert written == json.loads(json.dumps(found.to_dict()))
    assert {"system_prompt_sha256", "min_pixels", "max_pixels", "max_new_tokens", "verifier"} <= written[
        "settings"
    ].keys()
    assert written["environment"]["versions"]["transformers"]
    assert written["environment"]["hardware"]
    assert written["data"]["sources"] == {"reading": 3, "charts": 3}
    assert written["router"]["all"]["rows"] == 6


def test_the_page_shows_images_and_never_runs_what_a_model_wrote(loaded, tmp_path) -> None:
    folder = tmp_path / "a folder & co"
    folder.mkdir()
    (image, *_) = pictures(folder)
    hostile = load_records(
        [{"prompt": "<script>alert(1)</script>", "image": str(image), "answer": "</pre><img src=x>"}]
    )

    evaluate(*loaded, hostile, out_dir=tmp_path / "out", **SHORT)

    page = (tmp_path / "out" / "view.html").read_text()
    assert "<script>" not in page
    assert "<img src=x>" not in page
    assert 'src="../a%20folder%20%26%20co/red.png"' in page


def test_images_that_are_only_in_memory_are_saved_once(loaded, tmp_path) -> None:
    from PIL import Image

    image = Image.open(pictures(tmp_path)[0])
    twice = load_records(
        [{"id": str(number), "prompt": "?", "image": image.copy(), "answer": "1"} for number in (1, 2)]
    )

    found = evaluate(*loaded, twice, out_dir=tmp_path / "out", **SHORT)

    (saved,) = (tmp_path / "out" / "images").iterdir()
    assert [row.images for row in found.completions] == [[f"images/{saved.name}"]] * 2
    assert Image.open(saved).tobytes() == image.convert("RGB").tobytes()


def test_plots_are_real_pictures(loaded, asked, tmp_path) -> None:
    from PIL import Image

    options = {**SHORT, "plots": True}
    evaluate(*loaded, asked, thinking=("auto", "on", "off"), out_dir=tmp_path, **options)

    for name in ("modes.png", "router.png", "tradeoff.png"):
        with Image.open(tmp_path / name) as drawn:
            assert len(set(drawn.convert("L").resize((200, 80)).tobytes())) > 20  # not an empty page


# ---- going on -------------------------------------------------------------------------------------------------------


def test_a_killed_run_generates_only_what_is_missing(loaded, asked, tmp_path, generated, report, middle) -> None:
    def run():
        return evaluate(*loaded, asked, thinking=("auto", "on", "off"), out_dir=tmp_path, threshold=middle, **SHORT)

    generated["stop_after"] = 3
    with pytest.raises(KeyboardInterrupt):
        run()
    before = generated["rows"]
    generated["stop_after"] = None
    found = run()

    assert 0 < before < 18
    assert generated["rows"] == 18
    whole = {(row.thinking, row.id): (row.completion, row.correct) for row in report[0].completions}
    assert {(row.thinking, row.id): (row.completion, row.correct) for row in found.completions} == whole
    run()
    assert generated["rows"] == 18  # nothing is left to do


def test_modes_and_rows_can_be_added(loaded, asked, tmp_path, generated) -> None:
    evaluate(*loaded, asked, thinking="on", out_dir=tmp_path, limit=2, **SHORT)
    found = evaluate(*loaded, asked, thinking=["on", False], out_dir=tmp_path, limit=3, **SHORT)

    assert generated["rows"] == 6
    assert [(row.thinking, row.id) for row in found.completions] == [
        (mode, id) for mode in ("on", "off") for id in ("q0", "q1", "q2")
    ]
    fewer = evaluate(*loaded, asked, thinking="on", out_dir=tmp_path, limit=1, **SHORT)
    assert fewer.modes["on"].all.rows == 1
    assert generated["rows"] == 6


def test_a_query_is_routed_once_for_all_runs(loaded, asked, tmp_path, monkeypatch) -> None:
    evaluate(*loaded, asked, thinking="on", out_dir=tmp_path, **SHORT)
    monkeypatch.setattr(loaded[0], "route", lambda **inputs: pytest.fail("the router was asked again"))

    found = evaluate(*loaded, asked, thinking="off", out_dir=tmp_path, **SHORT)

    assert all(row.thinking_probability is not None for row in found.completions)


def test_another_model_is_refused(loaded, asked, tmp_path) -> None:
    model, processor = loaded
    evaluate(model, processor, asked[:1], out_dir=tmp_path, **SHORT)
    weight = model.model.language_model.layers[1].mlp.experts[1].down_proj.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(1.001)
        with pytest.raises(OutputError, match=r"model\.fingerprint"):
            evaluate(model, processor, asked[:1], out_dir=tmp_path, **SHORT)
        evaluate(model, processor, asked[:1], out_dir=tmp_path, overwrite=True, **SHORT)
    finally:
        with torch.no_grad():
            weight.copy_(before)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 7}, r"max_new_tokens: 6 there, 7 now"),
        ({"system_prompt": "Be brief."}, "system_prompt"),
        ({"threshold": 0.25}, r"threshold: 0.5 there, 0.25 now"),
    ],
)
def test_other_settings_are_refused(loaded, asked, tmp_path, options, named) -> None:
    evaluate(*loaded, asked[:1], out_dir=tmp_path, **SHORT)

    with pytest.raises(OutputError, match=named):
        evaluate(*loaded, asked[:1], out_dir=tmp_path, **{**SHORT, **options})


@pytest.mark.parametrize("change", ["question", "gold", "image", "gone"])
def test_other_data_are_refused(loaded, tmp_path, change) -> None:
    asked = rows(tmp_path, 2)
    evaluate(*loaded, load_records(asked), out_dir=tmp_path / "out", **SHORT)
    if change == "question":
        asked[1]["prompt"] = "Something else?"
    elif change == "gold":
        asked[1]["answer"] = "other"
    elif change == "image":
        path = Path(str(asked[1]["image"]))
        path.write_bytes((path.parent / "blue.png").read_bytes())
    else:
        asked.pop()

    with pytest.raises(OutputError, match=r"1 rows (changed|gone) \(q1\)"):
        evaluate(*loaded, load_records(asked), out_dir=tmp_path / "out", **SHORT)


# ---- dense models, and what is refused ------------------------------------------------------------------------------


def test_a_dense_model_runs_in_the_same_harness(dense_directory, asked, tmp_path) -> None:
    from metis_home.training.loading import load_model, load_processor

    model, processor = load_model(str(dense_directory), device="cpu").eval(), load_processor(str(dense_directory))
    found = evaluate(model, processor, asked[:3], thinking=("auto", "on"), out_dir=tmp_path, **SHORT)

    assert found.model["routes"] is False
    assert found.router == {}
    assert found.modes["on"].all.thinking is None
    assert {row.branch for row in found.completions} == {None}
    assert any("no router" in note for note in found.notes)
    plain = {row.id: row.completion for row in found.completions if row.thinking == "auto"}
    for record in asked[:3]:
        text = processor.apply_chat_template(record.messages, add_generation_prompt=True)
        images = (
            [block["image"] for block in record.messages[-1]["content"] if block["type"] == "image"]
            if isinstance(record.messages[-1]["content"], list)
            else []
        )
        inputs = processor(text=[text], images=images or None, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert plain[record.id] == processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_rows_with_the_same_id_are_refused(loaded, asked, tmp_path) -> None:
    with pytest.raises(DataError, match="two rows have the id 'q0'"):
        evaluate(*loaded, [asked[0], asked[0]], out_dir=tmp_path, **SHORT)
    with pytest.raises(DataError, match="no records"):
        evaluate(*loaded, [], out_dir=tmp_path, **SHORT)
    with pytest.raises(BranchError, match="router_threshold"):
        evaluate(*loaded, asked, out_dir=tmp_path, threshold=1.5, **SHORT)


def test_modes_are_read_in_every_spelling() -> None:
    assert check_modes(["off", True, "auto", "on"]) == ["auto", "on", "off"]
    assert check_modes(False) == ["off"]
    for wrong in ("always", [], ["auto", "maybe"]):
        with pytest.raises(DataError, match="thinking must be"):
            check_modes(wrong)
