"""`metis-home pass-rates`, `build-sft`: inputs are kept, what does not fit is refused, mistakes are one line."""

import json
from pathlib import Path

import pytest

from metis_home.cli import main
from metis_home.training.data.records import load_records, write_rows
from metis_home.training.evaluation.fingerprint import question_fingerprint
from tests.processing.tiny import write_dense_model

RIGHT, WRONG = "<think>so</think><answer>7</answer>", "<think>so</think><answer>8</answer>"
SHORT = ("--samples", "2", "--max-new-tokens", "3", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense_model(tmp_path_factory.mktemp("model") / "dense")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Call the command line in this process; returns (status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def write_prompts(folder: Path, count: int = 3) -> Path:
    file = folder / "prompts.jsonl"
    write_rows(file, [{"id": f"q{n}", "prompt": f"{n} and?", "solution": "7"} for n in range(count)])
    return file


def write_rates(prompts: Path, count: int) -> Path:
    """Pass rates of 1/2 of the first prompts."""
    file = prompts.with_name("rates.jsonl")
    completions = [{"text": text, "correct": text == RIGHT, "tokens": 5} for text in (RIGHT, WRONG)]
    write_rows(
        file,
        [
            {
                "id": record.id,
                "answer": record.answer,
                "question": question_fingerprint(record),
                "pass_rate": 0.5,
                "completions": completions,
            }
            for record in load_records(prompts)[:count]
        ],
    )
    return file


def test_no_file_that_is_read_is_written(run, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path)
    rates, before = write_rates(prompts, 3), prompts.read_bytes()
    report = tmp_path / "x.report.json"
    report.write_bytes(before)

    for arguments in (
        ("pass-rates", "m", prompts, "--out", tmp_path / "." / "prompts.jsonl"),
        ("build-sft", prompts, "--pass-rates", rates, "--out", prompts),
        ("build-sft", prompts, "--pass-rates", rates, "--out", rates),
        ("build-sft", prompts, "--pass-rates", rates, "--exclude", tmp_path / "e.jsonl", "--out", tmp_path / "e.jsonl"),
        ("build-sft", report, "--pass-rates", rates, "--out", tmp_path / "x.jsonl"),
    ):
        status, out, err = run(*arguments, "--overwrite")
        assert (status, out) == (1, "")
        assert "is read. Use another --out." in err
    assert prompts.read_bytes() == report.read_bytes() == before
    assert len(rates.read_text().splitlines()) == 3


def test_rows_without_a_pass_rate_are_an_error_unless_they_are_allowed(run, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path)
    build = ("build-sft", prompts, "--pass-rates", write_rates(prompts, 2), "--out", tmp_path / "sft.jsonl")

    status, out, err = run(*build)
    assert (status, out) == (1, "")
    assert "1 of 3 rows have no pass rate, the first is 'q2'" in err
    status, out, _ = run(*build, "--partial")
    assert status == 0
    assert "1 prompts without a pass rate, left out" in out
    assert len((tmp_path / "sft.jsonl").read_text().splitlines()) == 2


def test_an_expert_is_not_asked_where_rates_and_rows_do_not_fit(run, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path)
    rates = write_rates(prompts, 3)
    write_rows(prompts, [{"id": f"q{n}", "prompt": f"{n} or?", "solution": "7"} for n in range(3)])
    expert = ("--expert-url", "http://127.0.0.1:9", "--expert-model", "e")

    status, out, err = run("build-sft", prompts, "--pass-rates", rates, "--out", tmp_path / "sft.jsonl", *expert)

    assert (status, out) == (1, "")
    assert "3 of 3 rows have another question or image" in err


@pytest.mark.parametrize("device", ["nope", "cuda:99"])
def test_a_device_that_is_not_there_is_one_line(run, model: Path, tmp_path: Path, device: str) -> None:
    prompts = write_prompts(tmp_path)

    status, out, err = run("pass-rates", model, prompts, "--out", tmp_path / "r.jsonl", *SHORT[:-1], device)

    assert (status, out) == (1, "")
    assert f"cannot be loaded on device '{device}'" in err


@pytest.mark.parametrize(
    ("name", "words"), [("/nonexist", "/nonexist: no such directory"), ("a/b/c", "a/b/c: there is no processor there")]
)
def test_a_model_that_is_not_there_is_one_line(run, tmp_path: Path, name: str, words: str) -> None:
    status, out, err = run("pass-rates", name, write_prompts(tmp_path), "--out", tmp_path / "r.jsonl", *SHORT)

    assert (status, out) == (1, "")
    assert words in err


def test_rows_are_checked_before_the_weights_are_loaded(run, model: Path, tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "What?", "solution": "7"}
    for rows, words in (([], "no rows"), ([row, row], "duplicate id"), ([{**row, "image": "gone"}], "missing image")):
        write_rows(tmp_path / "rows.jsonl", rows)

        status, out, err = run(
            "pass-rates", model, tmp_path / "rows.jsonl", "--out", tmp_path / "r.jsonl", "--estimate"
        )

        assert (status, out) == (1, "")
        assert words in err


def test_a_second_run_finds_all_done_and_overwrite_does_it_again(run, model: Path, tmp_path: Path) -> None:
    sample = ("pass-rates", model, write_prompts(tmp_path), "--out", tmp_path / "r.jsonl", *SHORT)
    assert run(*sample)[0] == 0
    written = (tmp_path / "r.jsonl").stat().st_mtime_ns

    status, out, err = run(*sample)
    assert (status, out.strip()) == (0, str(tmp_path / "r.jsonl"))
    assert "is complete already" in err
    assert (tmp_path / "r.jsonl").stat().st_mtime_ns == written
    assert "seed: 0 then, 1 now" in run(*sample, "--seed", "1")[2]
    assert run(*sample, "--seed", "1", "--overwrite")[0] == 0


def test_answers_are_sampled_with_the_system_prompt_of_the_training(run, model: Path, tmp_path: Path) -> None:
    sample = ("pass-rates", model, write_prompts(tmp_path), *SHORT)
    recipe = model / "recipe.json"

    def used(name: str, *options: str) -> tuple[object, str]:
        status, _, err = run(*sample, "--out", tmp_path / name, *options)
        assert status == 0
        return json.loads((tmp_path / f"{name}.settings.json").read_text())["system_prompt"], err

    try:
        recipe.write_text(json.dumps({"stage": "rl", "training": {"system_prompt": None}}))
        prompt, err = used("trained")
        assert prompt is None
        assert "system prompt: the chat template's own, as in training" in err
        recipe.write_text(json.dumps({"stage": "rl", "training": {"system_prompt": "Think."}}))
        assert used("other")[0] == "Think."
        prompt, err = used("given", "--system", "Do.")
        assert prompt == "Do."
        assert "system prompt" not in err
    finally:
        recipe.unlink()
