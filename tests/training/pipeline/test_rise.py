"""`metis-home rise` on a tiny model: killed in the middle of Stage-RL, carried to the end, and done only once."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from metis_home import MetisHomeForConditionalGeneration
from metis_home.cli import main
from metis_home.errors import CheckpointError, DataError, RecipeError, TrainingError
from metis_home.training.checkpoints import newest_checkpoint
from metis_home.training.data.records import write_rows
from metis_home.training.pipeline.rise import LOCK, load_rise_recipe, plan_steps, run_rise
from metis_home.training.recipe import load_recipe
from metis_home.training.run import run_recipe
from tests.processing.tiny import write_dense_model

RL_STEPS = 10
FOLDERS = ("1-rl", "2-pass-rates", "3-sft-set", "4-convert", "5-sft", "6-evaluate")


def write_recipe(folder: Path) -> Path:
    """A recipe with its model and rows: the random model solves nothing, and one of the expert's answers is wrong."""
    write_dense_model(folder / "dense")
    golds = {f"p{number}": str(number) for number in range(4)}
    write_rows(
        folder / "prompts.jsonl",
        [{"id": name, "prompt": f"Add {gold}.", "answer": gold} for name, gold in golds.items()],
    )
    write_rows(
        folder / "expert.jsonl",
        [{"id": name, "reasoning": "so", "answer": "9" if name == "p0" else gold} for name, gold in golds.items()],
    )
    direct = [{"id": f"d{n}", "prompt": f"Read {n}.", "answer": str(n), "mode": "non_thinking"} for n in range(5)]
    write_rows(folder / "direct.jsonl", direct)
    write_rows(folder / "held_out.jsonl", [direct[4], {"id": "h", "prompt": "Add 8.", "answer": "8"}])
    training = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "plots": False, "save_steps": 1}
    recipe = {
        **{name: str(folder / f"{name}.jsonl") for name in ("prompts", "held_out")},
        "non_thinking": str(folder / "direct.jsonl"),
        "model": str(folder / "dense"),
        "output_dir": str(folder / "out"),
        "system_prompt": "",
        "rl": {
            "rewards": ["accuracy_reward", "format_reward"],
            "training": {
                **training,
                "max_steps": RL_STEPS,
                "prompts_per_step": 2,
                "num_generations": 2,
                "max_completion_tokens": 4,
                "dynamic_sampling": False,
                "kl_coef": 0.1,
                "learning_rate": 1e-3,
                "weight_decay": 0.1,
            },
        },
        "pass_rates": {"samples": 2, "max_new_tokens": 4},
        "sft_set": {"expert_file": str(folder / "expert.jsonl")},
        "sft": {"training": {**training, "max_steps": 2, "per_device_train_batch_size": 2}},
        "evaluate": {"max_new_tokens": 4},
    }
    path = folder / "rise.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Run until the second checkpoint of Stage-RL, kill all of it; then run to the end. What was seen on the way."""
    folder = tmp_path_factory.mktemp("rise")
    recipe, checkpoint = write_recipe(folder), folder / "out/1-rl/model/checkpoint-2"
    command = [sys.executable, "-m", "metis_home.cli", "rise", str(recipe)]
    run = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + 900  # a busy machine imports for minutes
        while not (checkpoint / "trainer_state.json").exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(run.pid, signal.SIGSTOP)
        assert checkpoint.exists()
        assert not (folder / "out/1-rl/done.json").exists()
        run.kill()  # the pipeline alone: what it started lives on
        run.wait()
        with pytest.raises(TrainingError, match="still at work"):
            run_rise(load_rise_recipe(recipe, []), say=print)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    written = (checkpoint / "trainer_state.json").stat().st_mtime_ns

    while _is_locked(folder / "out"):  # the killed command's lock goes with it, a moment later
        time.sleep(0.05)
    with pytest.raises(SystemExit) as finished:
        main(["rise", str(recipe)])
    return {
        "recipe": recipe,
        "out": folder / "out",
        "status": finished.value.code,
        "redone": (checkpoint / "trainer_state.json").stat().st_mtime_ns != written,
    }


def _is_locked(folder: Path) -> bool:
    with (folder / LOCK).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_a_killed_pipeline_goes_on_in_the_middle_of_a_training(interrupted: dict, tmp_path: Path) -> None:
    assert not interrupted["status"]
    assert not interrupted["redone"]
    assert all((interrupted["out"] / name / "done.json").exists() for name in FOLDERS)

    # ... and comes to the weights of a training that nothing interrupted, bit for bit.
    stage = interrupted["out"] / "1-rl"
    run_recipe(load_recipe(stage / "recipe.yaml", [f"training.output_dir={tmp_path / 'whole'}"]))
    whole, resumed = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", stage / "model"))
    start = load_file(interrupted["out"].parent / "dense" / "model.safetensors")
    assert all(whole[name].equal(resumed[name]) for name in whole)
    assert any(not whole[name].equal(start[name]) for name in whole)


def test_the_pipeline_makes_a_two_branch_model_from_verified_answers(interrupted: dict) -> None:
    out = interrupted["out"]
    summary = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "3-sft-set/sft.jsonl").read_text().splitlines()]

    assert summary["sft_set"] | {"prompts": 4, "never": 4, "expert": 3, "expert_wrong": 1} == summary["sft_set"]
    assert summary["sft_set"]["non_thinking"] == 3
    # A direct row asks what a held-out row asks: it is not taught.
    assert sorted(row["id"] for row in rows if row["mode"] == "thinking") == ["p1", "p2", "p3"]
    assert "d4" not in [row["id"] for row in rows]
    assert list(summary["modes"]) == ["auto", "on", "off"]
    assert [summary["modes"][mode]["thinking_ratio"] for mode in ("on", "off")] == [1.0, 0.0]
    model = MetisHomeForConditionalGeneration.from_pretrained(out / "5-sft/model")
    assert model.config.router_trained


def test_a_finished_pipeline_does_nothing_again_and_refuses_other_settings(interrupted: dict) -> None:
    again = run_rise(load_rise_recipe(interrupted["recipe"], []), say=print)

    assert [step["skipped"] for step in again] == [True] * 6
    with pytest.raises(RecipeError, match="Stage-RL was done with other settings"):
        run_rise(load_rise_recipe(interrupted["recipe"], ["rl.training.learning_rate=1e-4"]), say=print)
    with pytest.raises(RecipeError, match="evaluate was done with other settings"):
        run_rise(load_rise_recipe(interrupted["recipe"], ["evaluate.max_new_tokens=5"]), say=print)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_step_whose_output_is_complete_is_done_whatever_killed_the_pipeline(interrupted: dict, name: str) -> None:
    done = interrupted["out"] / name / "done.json"
    done.unlink()

    again = run_rise(load_rise_recipe(interrupted["recipe"], []), say=print)

    assert [step["skipped"] for step in again] == [folder != name for folder in FOLDERS]
    assert done.exists()


def test_a_conversion_of_a_model_that_was_written_again_is_done_again(interrupted: dict) -> None:
    weights = interrupted["out"] / "1-rl/model/model.safetensors"
    made = interrupted["out"] / "4-convert/model/model.safetensors"
    before = load_file(made)
    weights.touch()
    (interrupted["out"] / "4-convert/done.json").unlink()

    run_rise(load_rise_recipe(interrupted["recipe"], []), say=print)

    assert all(tensor.equal(before[key]) for key, tensor in load_file(made).items())


def test_a_step_that_fails_says_why_and_the_next_try_begins_with_it(interrupted: dict, tmp_path: Path) -> None:
    recipe = load_rise_recipe(interrupted["recipe"], [f"output_dir={tmp_path / 'out'}"])
    steps = plan_steps(recipe)
    for step in [*steps[:3], *steps[4:]]:  # only the conversion is to be done
        step.folder.mkdir(parents=True)
        (step.folder / "done.json").write_text(json.dumps({"name": step.name, "seconds": 1, "digest": step.digest}))
    said: list[str] = []

    with pytest.raises(TrainingError, match="convert failed with status 1(.|\n)*1-rl/model"):
        run_rise(recipe, say=said.append)

    assert not (steps[3].folder / "done.json").exists()
    shutil.copytree(interrupted["out"] / "1-rl/model", steps[0].folder / "model")
    results = run_rise(recipe, say=said.append)
    assert [step["skipped"] for step in results] == [True, True, True, False, True, True]
    assert (steps[3].folder / "model/config.json").exists()


@pytest.mark.parametrize("name", ["prompts", "non_thinking", "held_out", "sft_set.expert_file"])
def test_rows_that_are_not_there_are_missed_before_the_first_step(tmp_path: Path, name: str) -> None:
    recipe = load_rise_recipe(write_recipe(tmp_path), [f"{name}={tmp_path / 'nowhere.jsonl'}"])

    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        run_rise(recipe, say=print)

    assert not (tmp_path / "out/1-rl").exists()


def test_a_model_that_is_not_there_is_missed_before_the_first_step(tmp_path: Path) -> None:
    recipe = load_rise_recipe(write_recipe(tmp_path), [f"model={tmp_path / 'nowhere'}"])

    with pytest.raises(CheckpointError, match="nowhere: there is no model there"):
        run_rise(recipe, say=print)

    assert not (tmp_path / "out/1-rl").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("evaluate.thinking=foo", "evaluate.thinking: expected auto, on, off, or several with commas; found 'foo'"),
        ("evaluate.max_new_tokens=0", "evaluate.max_new_tokens is 0; expected at least 1"),
        ("pass_rates.samples=0", "pass_rates.samples is 0; expected at least 1"),
        ("sft_set.ratio=-1", "sft_set.ratio is -1"),
        ("sft_set.expert_url=http://localhost", "expert_url and sft_set.expert_model go together"),
    ],
)
def test_what_a_later_step_would_refuse_is_refused_with_the_recipe(tmp_path: Path, setting: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_rise_recipe(write_recipe(tmp_path), [setting])


def test_the_system_prompt_is_one_for_all_stages(interrupted: dict) -> None:
    plan = plan_steps(load_rise_recipe(interrupted["recipe"], ["system_prompt=Think."]))

    assert [step.recipe["training"]["system_prompt"] for step in plan if step.recipe] == ["Think.", "Think."]
    asked = [step.command[step.command.index("--system") + 1] for step in plan if "--system" in step.command]
    assert asked == ["Think."] * 3
    with pytest.raises(RecipeError, match="say it once"):
        load_rise_recipe(interrupted["recipe"], ["sft.training.system_prompt=x"])


def test_a_checkpoint_whose_writing_was_interrupted_is_passed_over(tmp_path: Path) -> None:
    for number, state in ((2, "{}"), (10, "{}"), (11, '{"step": '), (12, None)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{number}/trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-99-old").mkdir()

    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert newest_checkpoint(tmp_path / "nothing") is None
