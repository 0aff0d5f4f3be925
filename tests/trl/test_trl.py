"""The exported recipe in a real TRL: it trains, with our rewards, with images, and its checkpoint can be converted.

Needs an environment made by `tests/trl/install_trl.sh`; TRL_TEST_PYTHON names its interpreter. The last test compares
TRL's losses and gradients with our trainer's for the same rollouts (benchmarks/rl_equality.py).
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from metis_home.training import rewards
from metis_home.training.data.records import load_records
from metis_home.training.pipeline.handover import export_recipe
from metis_home.training.recipe import Recipe, parse_recipe
from tests.processing.tiny import write_dense_model

PYTHON = os.environ.get("TRL_TEST_PYTHON", "")
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.trl,
    pytest.mark.skipif(not PYTHON, reason="TRL_TEST_PYTHON names no environment with TRL (make test-trl)"),
]
LONGEST, BUFFER = 12, 11
ON_CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "learning_rate": 1e-3}


def run(*command: str) -> str:
    """Run TRL's interpreter; returns what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([PYTHON, *command], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that ends its answers early, each at another place."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = write_dense_model(tmp_path_factory.mktemp("dense"))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    end = model.config.get_text_config().eos_token_id
    with torch.no_grad():
        for block in model.model.language_model.layers:  # whatever was written before
            block.mlp.down_proj.weight.mul_(0.1)
            block.self_attn.o_proj.weight.mul_(0.1)
        embedding = model.model.language_model.embed_tokens.weight
        embedding.copy_(torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0)) + 1)
        # A normed state has a mean of 0.7: the end's logit is 4.2, the others' about 0, so it comes in every fifth step.
        model.lm_head.weight[end] = 6 / embedding.shape[1]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an exported recipe after two steps of its train.py; rows with 0, 1 and 2 images are mixed."""
    work = tmp_path_factory.mktemp("handover")
    Image.effect_noise((56, 56), 64).convert("RGB").save(work / "noise.png")
    rows = [
        {"id": "one", "prompt": "<image>What is 3 + 4?", "images": ["noise.png"], "solution": "7", "kind": "integer"},
        {"id": "none", "prompt": "What is 1 + 1?", "solution": "2"},
        {"id": "two", "prompt": "<image><image>Two?", "images": ["noise.png"] * 2, "solution": "2"},
        {"id": "long", "prompt": "After many words: what is 1 + 1?", "solution": "2"},
    ]
    (work / "rl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_for(dense, work / "rl.jsonl")
    made = export_recipe(recipe, load_records(work / "rl.jsonl"), work / "trl", target="trl")
    run(str(made.folder / "train.py"), "--max_steps", "2", "--config", json.dumps(ON_CPU))
    return made.folder


def recipe_for(dense: Path, rows: Path, **training: object) -> Recipe:
    """Stage-RL on these rows."""
    return parse_recipe(
        {
            "stage": "rl",
            "model": {"path": str(dense)},
            "data": {"train": [str(rows)]},
            "rewards": ["accuracy_reward", "format_reward", "efficiency_reward"],
            "training": {
                "output_dir": "out",
                "num_generations": 4,
                "prompts_per_step": 4,
                "max_completion_tokens": LONGEST,
                "overlong_buffer_tokens": BUFFER,
                "reward_weights": [0.9, 0.1, 0.2],
                "overlong_weight": 0.5,
                "system_prompt": "Be brief.",
                "save_steps": 2,
                **training,
            },
        }
    )


def history(folder: Path) -> list[dict]:
    """What TRL logged, step by step."""
    state = json.loads((folder / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def test_an_exported_recipe_trains_in_trl(trained: Path, dense: Path) -> None:
    from safetensors.torch import load_file

    steps = history(trained)
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, trained / "out"))

    assert len(steps) == 2
    assert all(step["grad_norm"] > 0 and step["reward_std"] > 0 for step in steps)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not any(".visual." in f".{name}" for name in moved)  # the recipe freezes the tower


def test_trl_computes_our_rewards(trained: Path) -> None:
    """Each of the four, from what was written: TRL keeps every completion with its rewards."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(sorted((trained / "out" / "completions").glob("*.parquet"))[0]).to_pylist()
    limited = rewards.overlong_reward_for(LONGEST, BUFFER)
    golds = {"What is 3 + 4?": "7"}

    assert len(table) == 16
    for row in table:
        assert set(row["completion"][-1]) == {"role", "content"}  # not taken apart before it is judged
        text = _text(row["completion"])
        gold = next((gold for question, gold in golds.items() if question in str(row["prompt"])), "2")
        expected = [
            rewards.accuracy_reward([""], [text], solution=[gold])[0],
            rewards.format_reward([""], [text])[0],
            rewards.efficiency_reward([""], [[{"role": "assistant", "content": text}]], solution=[gold])[0],
        ]
        assert [row[f"{name}_reward"] for name in ("accuracy", "format", "efficiency")] == expected
        possible = [limited([""], [text], completion_ids=[[0] * length])[0] for length in range(1, LONGEST + 1)]
        assert min(abs(row["overlong_reward"] - value) for value in possible) < 1e-6
    assert len({row["overlong_reward"] for row in table}) > 2


def test_images_reach_the_vision_tower(trained: Path, dense: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    rows = trained.parent / "rl.jsonl"
    made = export_recipe(recipe_for(dense, rows, freeze_vision=False), load_records(rows), tmp_path / "t", target="trl")

    run(str(made.folder / "train.py"), "--max_steps", "1", "--config", json.dumps(ON_CPU))

    before, after = (load_file(folder / "model.safetensors") for folder in (dense, made.folder / "out"))
    tower = [name for name in before if ".visual." in f".{name}" and name.endswith("weight")]
    assert tower
    assert any(not torch.equal(before[name], after[name]) for name in tower)


def test_every_image_token_is_in_the_prompts(trained: Path, dense: Path) -> None:
    """TRL counts the prompt tokens it was given; with every image they are as many as our encoder makes."""
    from metis_home import MetisHomeProcessor
    from metis_home.training.data.encode import Encoder

    encoder = Encoder(MetisHomeProcessor.from_pretrained(dense), system_prompt="Be brief.")
    records = load_records(trained.parent / "rl.jsonl")
    prompts = sum(encoder.count(record).prompt for record in records) * 4
    first = history(trained)[0]

    answers = round(first["completions/mean_length"] * 16)

    assert first["num_tokens"] == prompts + answers


def test_metis_home_converts_trls_checkpoint(trained: Path, tmp_path: Path) -> None:
    from metis_home import MetisHomeForConditionalGeneration, MetisHomeProcessor
    from metis_home.convert import upcycle, verify

    upcycle(trained / "out", tmp_path / "home")

    verify(tmp_path / "home", thinking=trained / "out", non_thinking=trained / "out")
    processor = MetisHomeProcessor.from_pretrained(tmp_path / "home")
    assert processor.tokenizer.response_template is not None
    assert MetisHomeForConditionalGeneration.from_pretrained(tmp_path / "home").config.model_type == "metis_home"


def test_rewards_run_unchanged_on_good_and_bad_answers(dense: Path, tmp_path: Path) -> None:
    """Answers come from outside, so that accuracy and format are not all 0."""
    script = tmp_path / "rewards_in_trl.py"
    script.write_text(_WITH_ANSWERS)

    printed = run(str(script), str(dense), str(tmp_path / "out"))

    logged = json.loads(printed.splitlines()[-1])
    assert logged["rewards/accuracy_reward/mean"] == pytest.approx(2 / 4)
    assert logged["rewards/format_reward/mean"] == pytest.approx(2 / 4)
    assert logged["rewards/efficiency_reward/mean"] == pytest.approx(2 / 4)
    assert logged["rewards/overlong_reward/mean"] == pytest.approx((0 + 0 - 0.5 - 1) / 4)


def test_losses_and_gradients_are_ours(tmp_path: Path) -> None:
    run(str(ROOT / "benchmarks" / "rl_equality.py"), "--json", str(tmp_path / "equality.json"))

    report = json.loads((tmp_path / "equality.json").read_text())

    assert set(report) == {"token_mean", "sequence_mean", "dr_grpo"}
    for result in report.values():
        assert len(result["ours"]) == 4
        assert all(step["gradient_norm"] > 0.01 for step in result["ours"])
        assert result["clipped"] > 0.05  # the second update of a batch is off the policy
        assert result["loss_difference"] < 1e-5
        assert result["gradient_difference"] < 1e-5


def _text(completion: object) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]  # type: ignore[index]


_WITH_ANSWERS = """
import contextlib, json, sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from metis_home import MetisHomeProcessor
from metis_home.training.rewards import accuracy_reward, efficiency_reward, format_reward, overlong_reward_for

model, out = sys.argv[1:]
processor = MetisHomeProcessor.from_pretrained(model)
processor.tokenizer.padding_side = "left"
processor.tokenizer.response_template = None
answers = [
    "<think>three and four</think><answer>7</answer>",  # right, 48 tokens with the end
    "<think>so</think><answer>8</answer>",
    "x" * 41 + "<answer>7</answer>",  # right without a thought, 60 tokens
    "x" * 80,
]


def rollouts(prompts, trainer):
    tokens = processor.tokenizer
    ids = [tokens(answer)["input_ids"] + [tokens.eos_token_id] for answer in answers]
    asked = dict(add_generation_prompt=True, tokenize=True, return_dict=True)
    return {
        "prompt_ids": [processor.apply_chat_template(prompt, **asked)["input_ids"][0] for prompt in prompts],
        "completion_ids": ids,
        "logprobs": [[-1.0] * len(one) for one in ids],
    }


with contextlib.redirect_stdout(sys.stderr):
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[accuracy_reward, format_reward, efficiency_reward, overlong_reward_for(70, 20)],
        args=GRPOConfig(
            output_dir=out, num_generations=4, per_device_train_batch_size=4, max_completion_length=90, max_steps=1,
            use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "What is 3 + 4?"}], "solution": "7"}]),
        processing_class=processor,
        rollout_func=rollouts,
    )
    trainer.train()
print(json.dumps(next(entry for entry in trainer.state.log_history if "reward" in entry)))
"""
