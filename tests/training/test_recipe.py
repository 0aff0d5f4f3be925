"""Recipes are read strictly: what is not known, missing or of another type is said, with the nearest name."""

from pathlib import Path

import pytest
import yaml

from metis_home.errors import RecipeError
from metis_home.training.recipe import load_recipe, parse_recipe, shipped_recipes

RECIPES = Path(__file__).parents[2] / "training" / "recipes"

SMALL = {
    "stage": "sft",
    "model": {"path": "home"},
    "data": {"train": "rows.jsonl"},
    "training": {"output_dir": "out"},
}


def changed(**sections: object) -> dict[str, object]:
    return {**SMALL, **sections}


def test_a_recipe_becomes_typed_settings() -> None:
    recipe = parse_recipe(changed(training={"output_dir": "out", "learning_rate": "1e-5", "freeze": ["vision"]}))

    assert recipe.data.train == ["rows.jsonl"]
    assert recipe.training == {"output_dir": "out", "learning_rate": 1e-5, "freeze": ["vision"]}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (changed(modle={}), "unknown setting modle. Did you mean model?"),
        (changed(model={"path": "home", "dtpye": "bf16"}), "unknown setting model.dtpye. Did you mean model.dtype?"),
        (changed(training={"output_dir": "out", "learning_rat": 1}), "Did you mean training.learning_rate?"),
        (changed(stage="sff"), "stage is 'sff'. Expected one of sft, router, rl"),
        (changed(model={}), "model.path is missing"),
        (changed(model={"path": None}), "model.path is missing"),
        (changed(data={}), "data.train is missing"),
        (changed(training={}), "training.output_dir is missing"),
        (changed(training={"output_dir": "out", "learning_rate": "fast"}), "training.learning_rate is 'fast'"),
        (changed(training={"output_dir": "out", "max_steps": 1.5}), "training.max_steps is 1.5"),
        (changed(model={"path": "home", "dtype": "int8"}), "model.dtype is 'int8'"),
        (changed(lora={"branch": "left"}), "lora.branch is 'left'"),
        (changed(training={"output_dir": "out", "deepspeed": "zero9.json"}), "shipped are zero2.json, zero3.json"),
        (changed(training=["output_dir"]), "Expected a mapping of settings"),
    ],
)
def test_what_is_wrong_is_named(tree: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        parse_recipe(tree)

    assert message in str(raised.value)


def test_the_command_line_goes_through_the_same_checks(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("stage: sft\nmodel: {path: home}\ndata: {train: [a.jsonl]}\ntraining: {output_dir: out}\n")

    recipe = load_recipe(file, ["training.learning_rate=2e-6", "data.train=[b.jsonl, c.jsonl]", "lora.r=4"])

    assert recipe.training["learning_rate"] == 2e-6
    assert recipe.data.train == ["b.jsonl", "c.jsonl"]
    assert recipe.lora is not None
    assert recipe.lora.r == 4
    with pytest.raises(RecipeError, match="Did you mean training.learning_rate"):
        load_recipe(file, ["training.learning_rte=1"])
    with pytest.raises(RecipeError, match=r"Expected key.sub=value"):
        load_recipe(file, ["training.learning_rate"])
    with pytest.raises(RecipeError, match="has no parts to set"):
        load_recipe(file, ["model.path.name=x"])


@pytest.mark.parametrize("text", ["a: [", "- a\n- b\n", ""])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)

    with pytest.raises(RecipeError, match="no YAML|a recipe is a mapping"):
        load_recipe(file)


def test_an_unknown_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match=r"home_sft\.yaml"):
        load_recipe("home_stf.yaml")


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_complete_but_for_its_paths(name: str) -> None:
    overrides = ["model.path=home", "data.train=rows.jsonl", "training.output_dir=out"]

    recipe = load_recipe(name, overrides)

    config = recipe.config_class()
    assert set(recipe.training) <= set(config.__dataclass_fields__)


def trained_models(tree: dict) -> list[dict]:
    """What has a model and trains it: a recipe, or those of the two trainings inside one of `metis-home rise`."""
    return [tree] if "stage" in tree else [tree["rl"], tree["sft"]]


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.name)
def test_no_shipped_recipe_trains_weights_whose_steps_are_rounded_away(file: Path) -> None:
    for part in trained_models(yaml.safe_load(file.read_text())):
        # DeepSpeed, peft and `train_router` keep float32 by themselves.
        keeps_float32 = "deepspeed" in part["training"] or "lora" in part or part.get("stage") == "router"
        assert keeps_float32 or part["model"]["dtype"] == "fp32"
