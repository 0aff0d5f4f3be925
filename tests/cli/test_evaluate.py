"""`metis-home evaluate`, `calibrate`, `think-ratio`: results on stdout, talk on stderr, exit status 0, 1 or 2."""

import json
import shutil

import pytest

from metis_home.cli import main
from metis_home.prompts import SYSTEM_PROMPT
from tests.processing.tiny import write_dense_model, write_model
from tests.training.evaluation.material import rows

SHORT = ("--max-new-tokens", "6", "--system", "", "--batch-tokens", "600", "--device", "cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "home")


@pytest.fixture
def model(trained, tmp_path):
    """A copy, because calibration writes into it."""
    return shutil.copytree(trained, tmp_path / "home")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(folder)))
    return str(path)


@pytest.fixture
def run(capsys):
    """Call the command line in this process; returns (status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_several_modes_are_measured_and_compared(run, model, data, tmp_path) -> None:
    out_dir = tmp_path / "out"
    status, out, err = run(
        "evaluate", model, data, "--thinking", "auto,on", "--thinking", "off", "--out", out_dir, *SHORT
    )

    assert status == 0
    for words in ("accuracy", "tokens saved", "the router against", "system prompt sha256", "max pixels", "hardware"):
        assert words in out
    assert str(out_dir) in err
    names = {path.name for path in out_dir.iterdir()}
    assert names >= {"report.json", "completions.jsonl", "view.html", "modes.png", "router.png", "tradeoff.png"}


def test_json_is_the_report_and_nothing_else(run, model, data, tmp_path) -> None:
    status, out, _ = run(
        "evaluate", model, data, "--out", tmp_path / "out", "--limit", 2, "--no-plots", "--json", *SHORT
    )

    assert status == 0
    assert json.loads(out) == json.loads((tmp_path / "out" / "report.json").read_text())
    assert json.loads(out)["data"]["rows"] == 2
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_directory_with_another_run_is_refused_unless_overwritten(run, model, data, tmp_path) -> None:
    ask = ("evaluate", model, data, "--out", tmp_path / "out", "--limit", 1, "--no-plots", *SHORT)
    run(*ask)

    status, out, err = run(*ask, "--threshold", "0.25")

    assert (status, out) == (1, "")
    assert "threshold: 0.5 there, 0.25 now" in err
    assert run(*ask, "--threshold", "0.25", "--overwrite")[0] == 0


def test_bad_rows_are_listed_before_anything_is_loaded(run, tmp_path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "?", "answer": "1", "image": "gone.png"}\n{"answer": "1"}\n')

    status, out, err = run("evaluate", tmp_path / "no-model", bad, "--out", tmp_path / "out")

    assert (status, out) == (1, "")
    assert "row 1" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("thinking", ["always", "", "auto,maybe"])
def test_an_unknown_mode_is_wrong_usage(run, data, tmp_path, thinking) -> None:
    status, _, err = run("evaluate", "m", data, "--thinking", thinking, "--out", tmp_path / "out")

    assert status == 2
    assert "auto, on, off" in err


def test_a_dense_model_is_measured_and_it_is_said_what_that_means(run, data, tmp_path) -> None:
    dense = write_dense_model(tmp_path / "dense")

    status, out, _ = run("evaluate", dense, data, "--out", tmp_path / "out", "--limit", 2, "--no-plots", *SHORT)

    assert status == 0
    assert "dense model" in out
    assert "reasoned" in out


def test_a_missing_model_and_a_missing_device_are_one_line(run, model, data, tmp_path) -> None:
    missing = run("evaluate", tmp_path / "gone", data, "--out", tmp_path / "out")
    device = run("evaluate", model, data, "--out", tmp_path / "out", "--device", "gpu9")

    for status, out, err in (missing, device):
        assert (status, out) == (1, "")
        assert err.startswith("error: ")


def test_the_system_prompt_is_the_one_of_the_training_unless_it_is_given(run, model, data, tmp_path) -> None:
    """Without `--system`: what `metis-home train` wrote beside the model, else Metis-RISE's."""
    asked = ("--max-new-tokens", "6", "--batch-tokens", "2000", "--device", "cpu", "--limit", 1)

    def used(name: str, *options: object) -> tuple[str, str]:
        ask = ("evaluate", model, data, "--out", tmp_path / name, "--no-plots", "--json", *asked, *options)
        status, out, err = run(*ask)
        assert status == 0, err
        return json.loads(out)["settings"]["system_prompt"], err

    assert used("untrained")[0] == SYSTEM_PROMPT
    (model / "recipe.json").write_text('{"stage": "sft", "training": {"output_dir": "o"}}')
    assert used("default")[0] == SYSTEM_PROMPT
    (model / "recipe.json").write_text('{"stage": "sft", "training": {"system_prompt": null}}')
    prompt, err = used("trained")
    assert prompt == ""
    assert "system prompt: the chat template's own, as in training" in err
    assert used("given", "--system", "Look.")[0] == "Look."
    calibrated = run(
        *(
            "calibrate",
            model,
            data,
            "--max-mean-tokens",
            99,
            "--dry-run",
            "--json",
            "--out",
            tmp_path / "c",
            *asked[:-2],
        )
    )
    assert calibrated[0] == 0, calibrated[2]
    assert json.loads((tmp_path / "c" / "run.json").read_text())["settings"]["system_prompt"] == ""
    assert "the chat template's own" in run("route", model, "4 and 4?", "--device", "cpu")[2]
    checkpoint = shutil.copytree(model, tmp_path / "training" / "checkpoint-3", ignore=lambda *_: ["recipe.json"])
    shutil.copy(model / "recipe.json", checkpoint.parent)
    assert "the chat template's own" in run("route", checkpoint, "4 and 4?", "--device", "cpu")[2]
    (model / "recipe.json").write_text("{")
    status, out, err = run("evaluate", model, data, "--out", tmp_path / "damaged")
    assert (status, out) == (1, "")
    assert "recipe.json does not say" in err
    assert "--system" in err


def test_the_threshold_is_picked_shown_and_written(run, model, data, tmp_path) -> None:
    ask = ("calibrate", model, data, "--target-thinking-ratio", "0.5", "--out", tmp_path / "out", *SHORT)
    before = json.loads((model / "generation_config.json").read_text())

    status, out, err = run(*ask)

    after = json.loads((model / "generation_config.json").read_text())
    assert status == 0
    assert "picked" in out
    assert "50.0%" in out
    assert "changed router_threshold" in err or "changed _from_model_config, router_threshold" in err
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} <= {
        "router_threshold",
        "_from_model_config",
    }
    routed = run("evaluate", model, data, "--out", tmp_path / "routed", "--no-plots", "--json", *SHORT)[1]
    assert json.loads(routed)["settings"]["threshold"] == after["router_threshold"]
    assert json.loads(routed)["modes"]["auto"]["all"]["thinking"]["value"] == 0.5


def test_a_dry_run_leaves_the_model_alone(run, model, data, tmp_path) -> None:
    before = (model / "generation_config.json").read_bytes()

    status, out, err = run(
        "calibrate", model, data, "--max-mean-tokens", 99, "--dry-run", "--json", "--out", tmp_path / "out", *SHORT
    )

    assert status == 0
    assert json.loads(out)["picked"]["mean_tokens"] <= 99
    assert "dry run" in err
    assert (model / "generation_config.json").read_bytes() == before


def test_an_unreachable_target_fails_and_changes_nothing(run, model, data, tmp_path) -> None:
    before = (model / "generation_config.json").read_bytes()

    status, out, err = run("calibrate", model, data, "--max-mean-tokens", 1, "--out", tmp_path / "out", *SHORT)

    assert (status, out) == (1, "")
    assert "the mean lies between" in err
    assert (model / "generation_config.json").read_bytes() == before


@pytest.mark.parametrize("targets", [(), ("--min-accuracy", "0.5", "--max-mean-tokens", "9")])
def test_exactly_one_target_is_taken(run, data, targets) -> None:
    status, _, err = run("calibrate", "m", data, *targets)

    assert status == 2
    assert "exactly one" in err


def test_a_hub_id_is_refused_before_anything_is_generated(run, data) -> None:
    status, _, err = run("calibrate", "owner/name", data, "--min-accuracy", "0.5")

    assert status == 1
    assert "--dry-run" in err


def test_ratios_of_several_files_are_one_table(run, tmp_path) -> None:
    for name, text in (("a_samples_mmmu_val.jsonl", "<think>r</think>4"), ("a_samples_ocrbench.jsonl", "4")):
        (tmp_path / name).write_text(json.dumps({"doc_id": 0, "resps": text, "category": "c"}) + "\n")

    status, out, _ = run("think-ratio", *sorted(tmp_path.iterdir()))
    as_json = json.loads(run("think-ratio", *sorted(tmp_path.iterdir()), "--json")[1])

    assert status == 0
    assert "mmmu_val" in out
    assert "100.0%" in out
    assert [(row["benchmark"], row["subject"], row["thinking"]["value"]) for row in as_json] == [
        ("mmmu_val", "all", 1.0),
        ("mmmu_val", "c", 1.0),
        ("ocrbench", "all", 0.0),
        ("ocrbench", "c", 0.0),
    ]
    assert run("think-ratio", tmp_path / "gone.jsonl")[0] == 1
