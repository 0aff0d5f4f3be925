"""`metis-home train`, `pass-rates`, `build-sft` and `rise` as a person types them."""

import json
from pathlib import Path

import pytest

from metis_home.cli import main
from metis_home.training.data.records import write_rows
from tests.processing.tiny import write_dense_model


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_the_shipped_recipes_are_listed(capsys) -> None:
    status, out, _ = run(capsys, "train", "--list")

    assert status == 0
    assert {"home_sft.yaml", "router_only.yaml", "pico_sft.yaml"} <= set(out.split())


def test_an_estimate_needs_no_checkpoint(capsys) -> None:
    status, out, _ = run(capsys, "train", "home_sft_72b_zero3.yaml", "--estimate", "--devices", "64", "--json")

    found = json.loads(out)
    assert status == 0
    assert found["device"] == sum(
        found[part] for part in ("weights", "gradients", "optimizer", "gathered", "activations", "head", "reserve")
    )
    assert 120e9 < found["parameters"] < 140e9  # 72B with a second FFN in each of 80 layers
    assert found["fits"]


def estimated(capsys, *settings: str) -> dict:
    status, out, _ = run(capsys, "train", "rise_rl.yaml", "--estimate", "--json", "model.shape=7b", *settings)
    assert status == 0
    return json.loads(out)


def test_an_estimate_of_stage_rl_counts_what_is_larger_the_update_or_the_rollouts(capsys) -> None:
    found = estimated(capsys)

    assert found["parameters"] == 8_292_166_656  # the dense Qwen2.5-VL-7B of the hub
    assert found["trainable"] == found["parameters"] - 676_550_144  # but for its vision tower
    # 262,144 tokens of 28 layers with 4 heads of 128: keys and values in bfloat16; and autocast's copies of matrices
    assert found["rollouts"] > 262_144 * 28 * 4 * 128 * 2 * 2
    update = found["gathered"] + found["activations"] + found["head"]
    kept = found["weights"] + found["gradients"] + found["optimizer"] + found["reserve"]
    assert found["device"] == kept + max(update, found["rollouts"])


def test_an_estimate_of_stage_rl_follows_its_settings(capsys) -> None:
    plain = estimated(capsys)

    assert estimated(capsys, "training.engine=server", "training.server_urls=[http://x]")["rollouts"] == 0
    with_reference = estimated(capsys, "training.kl_coef=0.1")
    assert with_reference["weights"] == 2 * plain["weights"]
    shorter = estimated(capsys, "training.per_device_train_batch_size=1", "training.micro_batch_tokens=100000")
    assert shorter["activations"] < plain["activations"]  # one rollout of 3,000 + 4,096 tokens at most
    one_branch = estimated(capsys, "training.thinking=true")
    assert one_branch["trainable"] == 28 * 3 * 3584 * 18944
    sharded = estimated(capsys, "training.deepspeed=zero3.json", "--devices", "8")
    assert sharded["rollouts"] == 262_144 * 28 * 4 * 128 * 2 * 2 + 2 * plain["parameters"]  # whole while generating


def test_an_estimate_says_when_it_does_not_fit(capsys) -> None:
    status, out, _ = run(capsys, "train", "home_sft_7b_zero2.yaml", "--estimate", "--devices", "1")

    assert status == 0
    assert "does NOT fit into 80 GiB" in out


def test_the_recipe_is_shown_as_it_was_understood(capsys) -> None:
    settings = ["model.path=m", "data.train=rows.jsonl", "training.output_dir=out", "training.learning_rate=3e-6"]

    status, out, _ = run(capsys, "train", "home_sft.yaml", "--show", *settings)

    assert status == 0
    assert json.loads(out)["training"]["learning_rate"] == 3e-6


def test_unsafe_local_is_said_on_the_command_line(capsys) -> None:
    settings = ["model.path=m", "data.train=rows.jsonl", "training.output_dir=out"]

    for given in ([], ["--unsafe-local"]):
        _, out, _ = run(capsys, "train", "hdpo_rl.yaml", "--show", *given, *settings)
        assert json.loads(out)["training"].get("unsafe_local", False) is bool(given)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("train",), 2, "name a recipe"),
        (("train", "home_sft.yaml", "--resume", "--overwrite"), 2, "choose one"),
        (("train", "home_stf.yaml"), 1, "no such recipe"),
        (("train", "home_sft.yaml"), 1, "model.path is missing"),
        (("train", "home_sft.yaml", "training.learning_rte=1"), 1, "Did you mean training.learning_rate?"),
        (("rise", "rise.yaml"), 1, "is missing"),
        (("build-sft", "d.jsonl", "--pass-rates", "r", "--out", "o", "--pick", "best"), 2, "shortest or all"),
        (("build-sft", "d.jsonl", "--pass-rates", "r", "--out", "o", "--expert-url", "u"), 2, "go together"),
    ],
)
def test_wrong_use_says_what_is_wrong(capsys, arguments: tuple[str, ...], status: int, message: str) -> None:
    found, out, err = run(capsys, *arguments)

    assert (found, out) == (status, "")
    assert message in " ".join(err.replace("│", " ").split())


def test_pass_rates_and_the_sft_set_from_the_command_line(capsys, tmp_path: Path) -> None:
    model = write_dense_model(tmp_path / "model")
    rows = [{"id": f"q{n}", "prompt": f"{n}?", "solution": str(n)} for n in range(3)]
    write_rows(tmp_path / "prompts.jsonl", rows)
    experts = [{"id": f"q{n}", "reasoning": "so", "answer": str(n if n else 9)} for n in range(3)]
    write_rows(tmp_path / "expert.jsonl", experts)
    rates, out = str(tmp_path / "rates.jsonl"), str(tmp_path / "sft.jsonl")
    sampling = ["--samples", "2", "--max-new-tokens", "3", "--prompts-per-unit", "2"]

    status, printed, talk = run(
        capsys, "pass-rates", str(model), str(tmp_path / "prompts.jsonl"), "--out", rates, *sampling
    )
    assert (status, printed.strip()) == (0, rates)
    assert "3 prompts x 2 samples = 6 rollouts" in talk

    # A random model solves nothing, so the expert is asked; one of its answers is wrong.
    prompts = str(tmp_path / "prompts.jsonl")
    status, printed, _ = run(
        capsys, "build-sft", prompts, "--pass-rates", rates, "--expert", str(tmp_path / "expert.jsonl"), "--out", out
    )

    assert status == 0
    assert "2 rows of the expert's" in printed
    assert "1 p = 0 with wrong expert answers only" in printed
    assert len(Path(out).read_text().splitlines()) == 2
    status, _, err = run(capsys, "build-sft", prompts, "--pass-rates", rates, "--out", out)
    assert status == 1
    assert "--overwrite" in err


def test_the_steps_of_rise_can_be_seen_before(capsys, tmp_path: Path) -> None:
    paths = [f"{name}={tmp_path / name}" for name in ("model", "prompts", "non_thinking", "held_out", "output_dir")]

    status, out, _ = run(capsys, "rise", "rise.yaml", "--dry-run", *paths)

    assert status == 0
    names = [line.partition(":")[0] for line in out.splitlines()]
    assert names == ["Stage-RL", "pass rates", "SFT set", "convert", "Stage-SFT", "evaluate"]
    assert not (tmp_path / "output_dir").exists()
