"""Recipes carried out on a tiny model: what they leave behind loads, and nothing is overwritten or half done."""

import json
from pathlib import Path

import pytest
import torch

from metis_home import MetisHomeForConditionalGeneration, MetisHomeProcessor
from metis_home.errors import RecipeError
from metis_home.training.data.records import write_rows
from metis_home.training.recipe import Recipe, load_recipe
from metis_home.training.run import run_recipe
from metis_home.training.same_run import SETTINGS_FILE
from tests.processing.tiny import write_model

SMALL = [
    "model.dtype=fp32",
    "model.min_pixels=784",
    "training.system_prompt=null",
    "training.max_steps=2",
    "training.per_device_train_batch_size=2",
    "training.use_cpu=true",
    "training.bf16=false",
    "training.report_to=none",
    "training.disable_tqdm=true",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("home") / "model", router_trained=False)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    thinking = [
        {"prompt": f"Add {n}.", "reasoning": "one more", "answer": str(n + 1), "mode": "thinking"} for n in range(3)
    ]
    direct = [{"prompt": f"Read {n}.", "answer": str(n), "mode": "non_thinking"} for n in range(3)]
    write_rows(path, [row for pair in zip(thinking, direct, strict=True) for row in pair])
    return path


def recipe(name: str, home: Path, rows: Path, out: Path, *settings: str) -> Recipe:
    paths = [f"model.path={home}", f"data.train={rows}", f"training.output_dir={out}"]
    return load_recipe(name, [*paths, *SMALL, *settings])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_stage_sft_leaves_a_model_that_loads(home: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen = recipe("home_sft.yaml", home, rows, out, "training.gradient_accumulation_steps=1")

    summary = run_recipe(chosen)

    trained = MetisHomeForConditionalGeneration.from_pretrained(out)
    before = MetisHomeForConditionalGeneration.from_pretrained(home)
    assert summary.steps == 2
    assert summary.metrics["loss"] > 0
    assert trained.config.router_trained
    moved = {
        name
        for (name, new), old in zip(trained.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert any("experts.0" in name for name in moved)
    assert any("experts.1" in name for name in moved)
    assert not any("visual" in name for name in moved)  # the recipe freezes the vision tower
    MetisHomeProcessor.from_pretrained(out)
    assert json.loads((out / SETTINGS_FILE).read_text())["training"]["freeze"] == ["vision"]


def test_a_router_is_trained_in_a_copy(home: Path, rows: Path, tmp_path: Path) -> None:
    before = contents(home)

    summary = run_recipe(recipe("router_only.yaml", home, rows, tmp_path / "out"))

    assert contents(home) == before
    trained = MetisHomeForConditionalGeneration.from_pretrained(summary.output_dir)
    untrained = MetisHomeForConditionalGeneration.from_pretrained(home)
    assert trained.config.router_trained
    assert not untrained.config.router_trained
    for (name, new), old in zip(trained.named_parameters(), untrained.parameters(), strict=True):
        assert torch.equal(new, old) == ("router" not in name), name


def test_lora_leaves_the_adapter_and_the_merged_model(home: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    run_recipe(recipe("home_sft_lora.yaml", home, rows, out, "lora.branch=thinking", "training.learning_rate=0.1"))

    merged = MetisHomeForConditionalGeneration.from_pretrained(out)
    before = MetisHomeForConditionalGeneration.from_pretrained(home)
    moved = {
        name
        for (name, new), old in zip(merged.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert (out / "adapter" / "adapter_config.json").is_file()
    assert all("experts.1" in name or "router" in name for name in moved)
    assert any("experts.1" in name for name in moved)


def test_nothing_is_overwritten_unasked_and_resume_needs_a_checkpoint(home: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    chosen = recipe("home_sft.yaml", home, rows, out, "training.gradient_accumulation_steps=1")
    with pytest.raises(RecipeError, match="no complete checkpoint to resume from"):
        run_recipe(chosen, resume=True)
    (out / "precious.txt").write_text("mine")
    with pytest.raises(RecipeError, match="already holds files"):
        run_recipe(chosen)

    run_recipe(chosen, overwrite=True)

    assert (out / "precious.txt").read_text() == "mine"


def test_a_run_goes_on_from_its_newest_checkpoint(home: Path, rows: Path, tmp_path: Path) -> None:
    settings = [
        "training.gradient_accumulation_steps=1",
        "training.save_steps=1",
        "training.lr_scheduler_type=constant",
    ]
    run_recipe(recipe("home_sft.yaml", home, rows, tmp_path / "whole", *settings))
    run_recipe(recipe("home_sft.yaml", home, rows, tmp_path / "cut", *settings, "training.max_steps=1"))

    summary = run_recipe(recipe("home_sft.yaml", home, rows, tmp_path / "cut", *settings), resume=True)

    assert summary.steps == 2
    whole, resumed = (
        MetisHomeForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "cut")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_finished_run_that_is_resumed_stays_as_it_is(home: Path, rows: Path, tmp_path: Path, stage: str) -> None:
    settings = ["training.save_steps=1", "training.lr_scheduler_type=constant", "training.learning_rate=0.01"]
    if stage == "sft":
        # 3 steps an epoch: what ends with an epoch ends by itself
        batches = ["training.packing=false", "training.max_tokens_per_batch=null"]
        name, settings = "home_sft.yaml", [*settings, *batches, "training.gradient_accumulation_steps=1"]
    else:
        rewards = ["rewards=[format_reward]", "training.reward_weights=null", "training.thinking=true"]
        sizes = ["training.prompts_per_step=1", "training.num_generations=2", "training.max_completion_tokens=4"]
        name, settings = "rise_rl.yaml", [*settings, *rewards, *sizes, "training.overlong_buffer_tokens=0"]
    run_recipe(recipe(name, home, rows, tmp_path / "out", *settings))
    before = contents(tmp_path / "out")

    summary = run_recipe(recipe(name, home, rows, tmp_path / "out", *settings), resume=True)

    assert summary.steps == 2
    after = contents(tmp_path / "out")
    assert after["model.safetensors"] == before["model.safetensors"]
    assert {file for file in after if "checkpoint" in file} == {file for file in before if "checkpoint" in file}


def test_a_resumed_run_keeps_its_settings(home: Path, rows: Path, tmp_path: Path) -> None:
    settings = ["training.gradient_accumulation_steps=1", "training.save_steps=1"]
    run_recipe(recipe("home_sft.yaml", home, rows, tmp_path / "out", *settings, "training.max_steps=1"))
    begun = (tmp_path / "out" / SETTINGS_FILE).read_text()

    changes = ["training.learning_rate=0.5", "data.train=[other.jsonl]", "model.min_pixels=1568", "lora.r=4"]
    for change in changes:
        with pytest.raises(RecipeError, match=f"(?s){change.partition('=')[0].split('.')[0]}.* was .* and is "):
            run_recipe(recipe("home_sft.yaml", home, rows, tmp_path / "out", *settings, change), resume=True)
    assert (tmp_path / "out" / SETTINGS_FILE).read_text() == begun

    further = [
        "training.max_steps=2",
        "training.logging_steps=3",
        "training.save_total_limit=1",
        "training.plots=false",
    ]
    assert (
        run_recipe(recipe("home_sft.yaml", home, rows, tmp_path / "out", *settings, *further), resume=True).steps == 2
    )


def test_adapters_on_a_dense_model_train_its_text_layers(rows: Path, tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    from tests.training.rl.pico_rl import dense, processor

    dense().save_pretrained(tmp_path / "dense")
    processor().save_pretrained(tmp_path / "dense")
    sizes = ["training.prompts_per_step=1", "training.num_generations=2", "training.max_completion_tokens=4"]
    settings = ["rewards=[format_reward]", "training.reward_weights=null", "training.overlong_buffer_tokens=0", *sizes]
    given = ["lora.r=2", "training.learning_rate=0.1", "training.dynamic_sampling=false", "training.nll_coef=0.1"]
    rewarded = [*settings, *given]

    run_recipe(recipe("rise_rl.yaml", tmp_path / "dense", rows, tmp_path / "out", *rewarded))

    assert (tmp_path / "out/adapter/adapter_config.json").is_file()
    Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out")
    with pytest.raises(RecipeError, match="has no branches"):
        run_recipe(recipe("rise_rl.yaml", tmp_path / "dense", rows, tmp_path / "b", *rewarded, "lora.branch=thinking"))


def test_settings_that_transformers_refuses_are_an_error_of_the_recipe(home: Path, rows: Path, tmp_path: Path) -> None:
    chosen = recipe("home_sft.yaml", home, rows, tmp_path / "out", "training.load_best_model_at_end=true")

    with pytest.raises(RecipeError, match="training: --load_best_model_at_end requires"):
        run_recipe(chosen)
