"""Recipes: a YAML file that says everything about one training run, read strictly.

    stage: sft                       # sft, router or rl
    model: {path: home-7b}           # `ModelSection`
    data: {train: [train.jsonl]}     # `DataSection`
    lora: {branch: thinking}         # `LoraSection`, optional
    training: {learning_rate: 1e-5}  # fields of the stage's config class, for example MetisSFTConfig

An unknown key is an error that names the nearest known one, a value of the wrong type is an error that says what was
expected, and `key.sub=value` from the command line goes through the same checks. Nothing is guessed.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_type_hints

from metis_home.errors import RecipeError

from .reward_references import is_reference

Stage = Literal["sft", "router", "rl"]

REWARDS = ("accuracy_reward", "format_reward", "efficiency_reward")

# The class whose fields the `training` section has.
_CONFIG_OF: dict[str, tuple[str, str]] = {
    "sft": ("metis_home.training.sft", "MetisSFTConfig"),
    "router": ("metis_home.training.sft", "MetisSFTConfig"),
    "rl": ("metis_home.training.rl", "MetisRLConfig"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection:
    """Which checkpoint is trained, and how it is loaded."""

    path: str
    """A directory or a hub id; two-branch, or (for `stage: rl`) dense."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of the loaded weights; auto: as they are stored."""
    attn_implementation: str | None = None
    """sdpa, flash_attention_2, eager, ...; default: what transformers chooses."""
    ffn_implementation: Literal["auto", "torch", "triton"] | None = None
    """Backend of the branch FFN; default: the model's."""
    processor: str | None = None
    """Where the processor is; default: `path`."""
    min_pixels: int | None = None
    max_pixels: int | None = None
    """Smallest and largest image area in pixels; default: the processor's own."""
    shape: Literal["3b", "7b", "32b", "72b"] | None = None
    """Which Qwen2.5-VL it is; only `--estimate` reads it, and only while `path` holds no checkpoint yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection:
    """What it is trained on. Files: JSONL, JSON, Parquet, saved `datasets` directories, hub data sets."""

    train: list[str]
    eval: list[str] = field(default_factory=list)
    image_root: str | None = None
    """Folder that relative image paths start from; default: the folder of each file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSection:
    """Train low-rank adapters instead of the weights."""

    branch: Literal["thinking", "non_thinking", "both"] = "both"
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training run, checked. `training` holds validated keyword arguments of the stage's config class."""

    stage: Stage
    model: ModelSection
    data: DataSection
    training: dict[str, object]
    lora: LoraSection | None = None
    rewards: tuple[str, ...] = ()
    """`stage: rl`: names of reward functions of `metis_home.training.rewards`, or `module:function`, weighed by
    `training.reward_weights`."""

    def config_class(self) -> type:
        """MetisSFTConfig or MetisRLConfig."""
        return _config_class(self.stage)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package and that `load_recipe` reads (pipelines are something else)."""
    found = [entry for entry in _shipped("recipes").iterdir() if entry.name.endswith(".yaml")]
    return sorted(entry.name for entry in found if re.search(r"^stage:", entry.read_text(encoding="utf-8"), re.M))


def load_recipe(path: str | Path, overrides: Iterable[str] = (), stand_ins: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe, put `key.sub=value` pairs over it, and check every key and value.

    Args:
        path: a YAML file, or the name of a shipped recipe such as `home_sft.yaml`.
        overrides: each `key.sub=value`; the value is read as YAML (`[a, b]` is a list, `null` is none).
        stand_ins: {"key.sub": value} for settings that nobody gave, where the caller does not need them.
    Raises:
        RecipeError: no such recipe, no YAML, unknown or missing keys, values of a wrong type.
    """
    tree = read_tree(path)
    for override in overrides:
        put(tree, override)
    for key, value in (stand_ins or {}).items():
        section, _, name = key.partition(".")
        part = tree.get(section)
        if part is None or (isinstance(part, dict) and part.get(name) is None):
            put(tree, f"{key}={value}")
    return parse_recipe(tree, str(path))


def parse_recipe(tree: Mapping[str, object], name: str = "recipe") -> Recipe:
    """Check a recipe that was already read from YAML.

    Raises:
        RecipeError: as `load_recipe`.
    """
    refuse_unknown(tree, [entry.name for entry in fields(Recipe)], name, "")
    stage = tree.get("stage")
    if stage not in _CONFIG_OF:
        raise RecipeError(f"{name}: stage is {stage!r}. Expected one of {', '.join(_CONFIG_OF)}.")
    # A misspelt setting is the likelier mistake, and often why another one is missing: all of them first.
    for where, kind in (("model", ModelSection), ("data", DataSection), ("lora", LoraSection)):
        _refuse_unknown_fields(kind, tree.get(where), name, where)
    _refuse_unknown_fields(_config_class(str(stage)), tree.get("training"), name, "training")
    model = parse_section(ModelSection, tree.get("model"), name, "model")
    data = parse_section(DataSection, _listed(tree.get("data"), ("train", "eval")), name, "data")
    lora = None if tree.get("lora") is None else parse_section(LoraSection, tree["lora"], name, "lora")
    training = _fields(_config_class(str(stage)), tree.get("training") or {}, name, "training")
    if not training.get("output_dir"):
        raise RecipeError(f"{name}: training.output_dir is missing. Add training.output_dir=DIR.")
    training["deepspeed"] = _deepspeed_file(training.get("deepspeed"), name)
    if training["deepspeed"] is None:
        del training["deepspeed"]
    rewards = _rewards(tree.get("rewards"), str(stage), name)
    return Recipe(stage=stage, model=model, data=data, training=training, lora=lora, rewards=rewards)  # type: ignore[arg-type]


def _rewards(names: object, stage: str, name: str) -> tuple[str, ...]:
    if stage != "rl":
        if names:
            raise RecipeError(f"{name}: rewards belong to stage rl; this recipe is stage {stage}.")
        return ()
    if not isinstance(names, list) or not names:
        raise RecipeError(f"{name}: rewards is {names!r}. Expected a list such as [accuracy_reward, format_reward].")
    for reward in names:
        if reward not in REWARDS and not is_reference(reward):
            near = difflib.get_close_matches(str(reward), REWARDS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise RecipeError(
                f"{name}: unknown reward {reward!r}. Known: {', '.join(REWARDS)}; one of your own is module:function.{hint}"
            )
    return tuple(names)


def _config_class(stage: str) -> type:
    module, name = _CONFIG_OF[stage]
    return getattr(import_module(module), name)


def _shipped(folder: str) -> Any:
    return files("metis_home.training") / folder


def read_tree(path: str | Path) -> dict[str, object]:
    """Read the YAML of a file or of a shipped recipe, unchecked.

    Raises:
        RecipeError: no such recipe, or no YAML mapping.
    """
    import yaml

    file: Any = Path(path)
    if not file.is_file():
        file = _shipped("recipes") / str(path)
        if Path(path).name != str(path) or not file.is_file():
            raise RecipeError(
                f"{path}: no such recipe. Expected a YAML file or one of the shipped recipes: "
                f"{', '.join(shipped_recipes())}"
            )
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: this is no YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping (stage, model, data, training); found {type(tree).__name__}")
    return tree


def put(tree: dict[str, object], override: str) -> None:
    """Set one `key.sub=value` in the tree, the value read as YAML.

    Raises:
        RecipeError: it is no setting, or goes below something that has no parts.
    """
    import yaml

    path, equals, text = override.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise RecipeError(f"{override!r} is no setting. Expected key.sub=value, such as training.learning_rate=1e-5.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: the value is no YAML: {error}") from error
    for depth, name in enumerate(names[:-1]):
        below = tree.setdefault(name, {})
        if below is None:
            below = tree[name] = {}
        if not isinstance(below, dict):
            raise RecipeError(f"{override!r}: {'.'.join(names[: depth + 1])} is {below!r}, it has no parts to set.")
        tree = below
    tree[names[-1]] = value


def _listed(section: object, names: tuple[str, ...]) -> object:
    """One file may be written without brackets."""
    if not isinstance(section, dict):
        return section
    return {key: [value] if key in names and isinstance(value, str) else value for key, value in section.items()}


def parse_section(kind: type, values: object, name: str, where: str) -> Any:
    """Build the dataclass `kind` from a mapping; `name` and `where` say in messages what is read.

    Raises:
        RecipeError: unknown or missing keys, values of a wrong type.
    """
    settings = _fields(kind, values if values is not None else {}, name, where)
    missing = [
        f"{_prefix(where)}{entry.name}"
        for entry in fields(kind)
        if entry.default is MISSING and entry.default_factory is MISSING and settings.get(entry.name) is None
    ]
    if missing:
        raise RecipeError(f"{name}: {missing[0]} is missing. Add {missing[0]}=... or write it into the recipe.")
    return kind(**{key: value for key, value in settings.items() if value is not None})


def _fields(kind: type, values: object, name: str, where: str) -> dict[str, object]:
    """Check that each key is a field of the dataclass `kind` and each value has its type; return the values read."""
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

    if not isinstance(values, Mapping):
        raise RecipeError(f"{name}: {where} is {values!r}. Expected a mapping of settings.")
    _refuse_unknown_fields(kind, values, name, where)
    hints = get_type_hints(kind)
    required = {entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING}
    checked: dict[str, object] = {}
    for key, value in values.items():
        if value is None and key in required:
            continue  # reported as missing
        try:
            checked[key] = TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(
                value
            )
        except ValidationError as error:
            problems = "; ".join(dict.fromkeys(problem["msg"] for problem in error.errors()))
            raise RecipeError(f"{name}: {_prefix(where)}{key} is {value!r}: {problems}") from error
        except PydanticUserError:  # a field of a class that pydantic cannot read from YAML, such as a config object
            checked[key] = value
    return checked


def _refuse_unknown_fields(kind: type, values: object, name: str, where: str) -> None:
    if isinstance(values, Mapping):
        refuse_unknown(values, [entry.name for entry in fields(kind) if entry.init], name, _prefix(where))


def _prefix(where: str) -> str:
    return f"{where}." if where else ""


def refuse_unknown(values: Mapping[str, object], known: list[str], name: str, prefix: str) -> None:
    """Raise where a key is none of `known`, and name the nearest.

    Raises:
        RecipeError: such a key.
    """
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f" Did you mean {prefix}{near[0]}?" if near else f" Known: {', '.join(sorted(known))}."
            raise RecipeError(f"{name}: unknown setting {prefix}{key}.{hint}")


def _deepspeed_file(value: object, name: str) -> object:
    """`zero3.json` is a file of the working directory, or else one that comes with the package."""
    if not isinstance(value, str) or Path(value).is_file():
        return value
    shipped = _shipped("deepspeed") / value
    if Path(value).name == value and shipped.is_file():
        return str(shipped)
    known = sorted(entry.name for entry in _shipped("deepspeed").iterdir() if entry.name.endswith(".json"))
    raise RecipeError(f"{name}: training.deepspeed is {value!r}: no such file; shipped are {', '.join(known)}.")
