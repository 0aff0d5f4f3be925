"""What is handed to another trainer: rows it can read, rewards that work, settings that say the same."""

import importlib.util
import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from metis_home.errors import DataError, OutputError, RecipeError
from metis_home.training.data.records import load_records
from metis_home.training.pipeline.handover import TARGETS, export_recipe
from metis_home.training.recipe import Recipe, parse_recipe


def recipe(**training: object) -> Recipe:
    return parse_recipe(
        {
            "stage": "rl",
            "model": {"path": "qwen-7b"},
            "data": {"train": ["rl.jsonl"]},
            "rewards": ["accuracy_reward", "format_reward"],
            "training": {
                "output_dir": "out",
                "num_generations": 4,
                "prompts_per_step": 6,
                "clip_high": 0.3,
                "reward_weights": [0.9, 0.1],
                "loss_aggregation": "sequence_mean",
                **training,
            },
        }
    )


@pytest.fixture
def records(tmp_path: Path) -> list:
    Image.new("RGB", (30, 40), "red").save(tmp_path / "red.png")
    rows = [
        {"id": "a", "prompt": "<image>What is 3 + 4?", "images": ["red.png"], "solution": "7", "kind": "integer"},
        {"id": "b", "prompt": "What is 1 + 1?", "solution": "2"},
    ]
    (tmp_path / "rl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_records(tmp_path / "rl.jsonl")


def script_settings(path: Path) -> list[str]:
    """The words that the shell would pass, with $HERE in them."""
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text().partition("&& pwd)\n")[2].replace("\\\n", " ")
    return shlex.split(text)


def module(path: Path):
    spec = importlib.util.spec_from_file_location(f"handed_{path.stem}", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_trl_gets_conversations_images_and_our_rewards(records, tmp_path: Path) -> None:
    made = export_recipe(recipe(), records, tmp_path / "trl", target="trl")

    rows = [json.loads(line) for line in (made.folder / "prompts.jsonl").read_text().splitlines()]
    assert [block["type"] for block in rows[0]["prompt"][1]["content"]] == ["image", "text"]
    assert [len(row["images"]) for row in rows] == [1, 0]
    assert Image.open(made.folder / rows[0]["images"][0]).size == (30, 40)
    fields = json.loads((made.folder / "config.json").read_text())["grpo"]
    assert (fields["epsilon"], fields["epsilon_high"], fields["delta"], fields["beta"]) == (0.2, 0.3, 3.0, 0.0)
    assert fields["loss_type"] == "grpo"
    assert fields["per_device_train_batch_size"] * fields["gradient_accumulation_steps"] == 4 * 6
    handed = module(made.folder / "rewards.py")
    answer = "<think>so</think><answer>7</answer>"
    assert [reward([""], [answer], solution=["7"]) for reward in handed.REWARDS] == [[1.0], [1.0]]
    assert handed.WEIGHTS == [0.9, 0.1]
    compile((made.folder / "train.py").read_text(), "train.py", "exec")
    assert any("refill" in note for note in made.not_carried_over)


def test_trl_gets_the_overlong_penalty_as_a_reward(records, tmp_path: Path) -> None:
    limits = {"max_completion_tokens": 20, "overlong_buffer_tokens": 10, "overlong_weight": 0.5}

    made = export_recipe(recipe(**limits), records, tmp_path / "trl", target="trl")

    handed = module(made.folder / "rewards.py")
    assert [reward.__name__ for reward in handed.REWARDS] == ["accuracy_reward", "format_reward", "overlong_reward"]
    assert handed.REWARDS[-1](["", ""], ["a", "b"], completion_ids=[[1] * 10, [1] * 15]) == [0.0, -0.5]
    assert handed.WEIGHTS == [0.9, 0.1, 0.5]


def test_every_setting_of_a_recipe_is_handed_over_or_named(records, tmp_path: Path) -> None:
    chosen = recipe(warmup_steps=5, adam_beta2=0.9, nll_coef=0.1, passes_per_rollout=2, top_k=7)

    notes = {
        target: export_recipe(chosen, records, tmp_path / target, target=target).not_carried_over for target in TARGETS
    }

    fields = json.loads((tmp_path / "trl" / "config.json").read_text())["grpo"]
    assert (fields["warmup_steps"], fields["adam_beta2"]) == (5, 0.9)
    assert (fields["num_iterations"], fields["top_k"]) == (2, 7)
    assert not any("warmup_steps" in note for note in notes["trl"])
    assert all(any("nll_coef = 0.1" in note for note in notes[target]) for target in TARGETS)
    assert all(any("warmup_steps = 5" in note for note in notes[target]) for target in ("verl", "swift"))
    assert "actor_rollout_ref.actor.ppo_epochs=2" in script_settings(tmp_path / "verl" / "train.sh")


def test_columns_that_the_verifier_reads_come_along(tmp_path: Path) -> None:
    rows = load_records([{"prompt": "Which?", "solution": "B", "kind": "choice", "options": ["red", "blue"]}])

    made = export_recipe(recipe(), rows, tmp_path / "trl", target="trl")

    row = json.loads((made.folder / "prompts.jsonl").read_text())
    accuracy = module(made.folder / "rewards.py").REWARDS[0]
    columns = {name: [row[name]] for name in ("solution", "kind", "options", "tolerance")}
    assert accuracy([""], ["<think>so</think><answer>blue</answer>"], **columns) == [1.0]


def test_several_golds_reach_every_trainer_as_lists(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = load_records([{"prompt": "Which?", "solution": ["crimson", "red"]}, {"prompt": "1 + 1?", "solution": "2"}])
    folders = {target: export_recipe(recipe(), rows, tmp_path / target, target=target).folder for target in TARGETS}

    golds = [["crimson", "red"], ["2"]]
    for target in ("trl", "swift"):
        lines = (folders[target] / "prompts.jsonl").read_text().splitlines()
        assert [json.loads(line)["solution"] for line in lines] == golds
    handed = parquet.read_table(folders["verl"] / "prompts.parquet").to_pylist()
    assert [row["reward_model"]["ground_truth"] for row in handed] == golds
    score = module(folders["verl"] / "rewards.py").compute_score
    assert [score("s", "<answer>red</answer>", gold, {})["acc"] for gold in golds] == [1.0, 0.0]


def test_verl_scores_by_the_recipes_weights(records, tmp_path: Path) -> None:
    made = export_recipe(recipe(reward_weights=[0.5, 0.25]), records, tmp_path / "verl", target="verl")

    score = module(made.folder / "rewards.py").compute_score
    assert score("s", "<think>so</think><answer>7</answer>", "7", {})["score"] == pytest.approx(0.75)
    assert score("s", "<think>so</think><answer>8</answer>", "7", {})["score"] == pytest.approx(0.25)


def test_verl_gets_parquet_and_a_script(records, tmp_path: Path) -> None:
    import pyarrow.parquet

    made = export_recipe(recipe(), records, tmp_path / "verl", target="verl")

    rows = pyarrow.parquet.read_table(made.folder / "prompts.parquet").to_pylist()
    assert rows[0]["prompt"][1]["content"] == "<image>What is 3 + 4?"
    assert rows[0]["images"][0]["bytes"].startswith(b"\x89PNG")
    assert rows[0]["reward_model"]["ground_truth"] == "7"
    score = module(made.folder / "rewards.py").compute_score
    answer = "<think>so</think><answer>7</answer>"
    assert score("s", answer, "7", rows[0]["extra_info"])["score"] == pytest.approx(1.0)
    words = script_settings(made.folder / "train.sh")
    assert "actor_rollout_ref.actor.clip_ratio_high=0.3" in words
    assert "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean" in words
    assert "data.train_files=$HERE/prompts.parquet" in words
    assert (made.folder / "train.sh").stat().st_mode & 0o100


def test_swift_gets_rows_a_plugin_and_a_script(records, tmp_path: Path) -> None:
    made = export_recipe(recipe(), records, tmp_path / "swift", target="swift")

    rows = [json.loads(line) for line in (made.folder / "prompts.jsonl").read_text().splitlines()]
    assert rows[0]["messages"][1]["content"] == "<image>What is 3 + 4?"
    assert (rows[0]["solution"], len(rows[0]["images"])) == ("7", 1)
    words = script_settings(made.folder / "train.sh")
    flags = {word: words[place + 1] for place, word in enumerate(words) if word.startswith("--")}
    assert (flags["--epsilon"], flags["--epsilon_high"], flags["--num_generations"]) == ("0.2", "0.3", "4")
    assert flags["--loss_type"] == "grpo"
    start = words.index("--reward_funcs")
    assert words[start + 1 : start + 3] == ["metis_accuracy", "metis_format"]
    assert 'orms["metis_accuracy"] = MetisAccuracyORM' in (made.folder / "plugin.py").read_text()


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_what_only_our_trainer_does_is_refused(target: str, records, tmp_path: Path) -> None:
    for change, word in (({"advantage": "hdpo"}, "advantage"), ({"thinking": True}, "thinking")):
        with pytest.raises(RecipeError, match=f"training.{word} .* cannot be handed over"):
            export_recipe(recipe(**change), records, tmp_path / "out", target=target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", TARGETS)
def test_rewards_of_the_users_own_are_refused(target: str, records, tmp_path: Path) -> None:
    mine = replace(recipe(reward_weights=None), rewards=("accuracy_reward", "my_rewards:short"))

    with pytest.raises(RecipeError, match="my_rewards:short: functions of your own cannot be handed over"):
        export_recipe(mine, records, tmp_path / "out", target=target)


def test_rows_without_a_gold_and_folders_in_use_are_refused(records, tmp_path: Path) -> None:
    gone = {"id": "g", "prompt": "What?", "solution": "4", "image": str(tmp_path / "gone.png")}
    with pytest.raises(DataError, match=r"row 0 \(g\): missing image"):
        export_recipe(recipe(), load_records([gone]), tmp_path / "out", target="trl")
    with pytest.raises(DataError, match="empty answer"):
        export_recipe(recipe(), load_records([{"prompt": "What?"}]), tmp_path / "out", target="trl")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="already exists"):
        export_recipe(recipe(), records, tmp_path / "out", target="trl")
    with pytest.raises(RecipeError, match="Expected one of trl, verl, swift"):
        export_recipe(recipe(), records, tmp_path / "out", target="openrlhf")
