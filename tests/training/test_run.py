"""Recipes carried out on a tiny model: what they leave behind loads, and nothing is overwritten or half done."""

import json
from pathlib import Path

import pytest
import torch

from metis_home import MetisHomeForConditionalGeneration, MetisHomeProcessor
from metis_home.errors import RecipeError
from metis_home.training.data.records import write_rows
from metis_home.training.recipe import Recipe, load_recipe
from metis_home.training.run import SETTINGS_FILE, run_recipe
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


def test_settings_that_transformers_refuses_are_an_error_of_the_recipe(home: Path, rows: Path, tmp_path: Path) -> None:
    chosen = recipe("home_sft.yaml", home, rows, tmp_path / "out", "training.load_best_model_at_end=true")

    with pytest.raises(RecipeError, match="training: --load_best_model_at_end requires"):
        run_recipe(chosen)
