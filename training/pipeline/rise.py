"""`metis-home rise`: RL -> pass rates -> SFT set -> convert -> Stage-SFT -> evaluate, as the commands a person would type.

Every step is a command of its own in a process of its own: what it takes and makes stands in files, memory and process
groups end with it, and each can be repeated by hand. A finished step leaves `done.json`; a run that was stopped goes on
with the first step without one, and inside a step where that step's own resume allows.

Source: Metis-RISE (arXiv 2506.13056) for the order, Metis-HOME (arXiv 2510.20519) for conversion and Stage-SFT.
"""

import fcntl
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import xxhash

from metis_home.errors import CheckpointError, DataError, RecipeError, TrainingError
from metis_home.prompts import SYSTEM_PROMPT

from ..checkpoints import newest_checkpoint
from ..data.records import load_records
from ..evaluation.completions import split_modes
from ..recipe import parse_recipe, parse_section, put, read_tree, refuse_unknown
from .experts import answers_from_file

DONE = "done.json"
LOCK = "lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRatesSection:
    """`metis-home pass-rates`."""

    samples: int = 8
    """N; not published, ours."""
    temperature: float = 1.0
    max_new_tokens: int = 8192
    batch_tokens: int = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class SftSetSection:
    """`metis-home build-sft`."""

    ratio: float = 1.0
    pick: Literal["shortest", "all"] = "shortest"
    expert_file: str | None = None
    expert_url: str | None = None
    expert_model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateSection:
    """`metis-home evaluate`."""

    thinking: str = "auto,on,off"
    max_new_tokens: int = 8192
    batch_tokens: int = 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class RiseRecipe:
    """All stages."""

    output_dir: str
    model: str
    """The dense model that RL begins with."""
    prompts: str
    """Rows with golds: RL trains on them, and pass rates are taken on them."""
    non_thinking: str
    """Rows of the non-thinking part."""
    held_out: str
    """Rows that are never trained on."""
    rl: dict[str, object]
    """`model`, `rewards` and `training` of a recipe with stage rl."""
    sft: dict[str, object]
    """`model`, `training` and `lora` of a recipe with stage sft."""
    pass_rates: PassRatesSection = field(default_factory=PassRatesSection)
    sft_set: SftSetSection = field(default_factory=SftSetSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    system_prompt: str = SYSTEM_PROMPT
    """For rows without one, in every stage; "": the chat template's own. Default: Metis-RISE's."""
    launch: list[str] = field(default_factory=list)
    """What starts training and sampling on several devices, for example [torchrun, --nproc-per-node, "8"]."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command."""

    name: str
    folder: Path
    command: list[str]
    resume: list[str]
    """Arguments to add where an earlier try was cut."""
    recipe: dict[str, object] | None = None
    """What is written to `recipe.yaml` of the folder first."""

    @property
    def digest(self) -> str:
        """Tells whether the step is still the one that was done."""
        return xxhash.xxh128(json.dumps([self.command, self.recipe], sort_keys=True, default=str).encode()).hexdigest()


def load_rise_recipe(path: str | Path, overrides: list[str]) -> RiseRecipe:
    """Read and check the whole recipe, the stages' parts too.

    Raises:
        RecipeError: unknown, missing or impossible settings, in any stage.
    """
    tree = read_tree(path)
    for override in overrides:
        put(tree, override)
    sections = {"pass_rates": PassRatesSection, "sft_set": SftSetSection, "evaluate": EvaluateSection}
    parsed = {name: parse_section(kind, tree.pop(name, None), str(path), name) for name, kind in sections.items()}
    recipe: RiseRecipe = parse_section(RiseRecipe, {**tree, **parsed}, str(path), "")
    for stage in ("rl", "sft"):
        refuse_unknown(getattr(recipe, stage), ["model", "training", "lora", "rewards"], str(path), f"{stage}.")
        training = getattr(recipe, stage).get("training")
        if isinstance(training, dict) and "system_prompt" in training:
            raise RecipeError(f"{path}: {stage}.training.system_prompt: say it once, as system_prompt of all stages.")
    _check_values(recipe, str(path))
    for step in plan_steps(recipe):
        if step.recipe is not None:
            parse_recipe(step.recipe, f"{path}, {step.name}")
    return recipe


def plan_steps(recipe: RiseRecipe) -> list[Step]:
    """All commands, in order."""
    out = Path(recipe.output_dir)
    rl, rates, rows = out / "1-rl", out / "2-pass-rates", out / "3-sft-set"
    home, sft, report = out / "4-convert", out / "5-sft", out / "6-evaluate"
    rates_file, rows_file = rates / "rates.jsonl", rows / "sft.jsonl"
    own = [sys.executable, "-m", "metis_home.cli"]
    spread = [*recipe.launch, "-m", "metis_home.cli"] if recipe.launch else own
    rl_recipe = _stage_recipe("rl", recipe, recipe.model, recipe.prompts, rl / "model")
    sft_recipe = _stage_recipe("sft", recipe, str(home / "model"), str(rows_file), sft / "model")
    system = [] if recipe.system_prompt == SYSTEM_PROMPT else ["--system", recipe.system_prompt]
    sampling, chosen = recipe.pass_rates, recipe.sft_set
    expert: list[str] = []
    if chosen.expert_file is not None:
        expert = ["--expert", chosen.expert_file]
    elif chosen.expert_url is not None:
        expert = ["--expert-url", chosen.expert_url, "--expert-model", chosen.expert_model or ""]
    return [
        Step(
            name="Stage-RL",
            folder=rl,
            command=[*spread, "train", str(rl / "recipe.yaml")],
            resume=["--resume"],
            recipe=rl_recipe,
        ),
        Step(
            name="pass rates",
            folder=rates,
            command=[
                *(*spread, "pass-rates", str(rl / "model"), recipe.prompts, "--out", str(rates_file)),
                *("--samples", str(sampling.samples), "--temperature", str(sampling.temperature)),
                *("--max-new-tokens", str(sampling.max_new_tokens), "--batch-tokens", str(sampling.batch_tokens)),
                *("--seed", str(recipe.seed), *system),
            ],
            resume=[],
        ),
        Step(
            name="SFT set",
            folder=rows,
            command=[
                *(*own, "build-sft", recipe.prompts, "--pass-rates", str(rates_file), "--out", str(rows_file)),
                *("--non-thinking", recipe.non_thinking, "--ratio", str(chosen.ratio), "--pick", chosen.pick),
                *("--exclude", recipe.held_out, "--seed", str(recipe.seed), "--overwrite", *expert, *system),
            ],
            resume=[],
        ),
        Step(
            name="convert",
            folder=home,
            command=[*own, "convert", str(rl / "model"), str(home / "model")],
            # What is there may be of an earlier Stage-RL, if that was done again: it is replaced.
            resume=["--resume", "--overwrite"],
        ),
        Step(
            name="Stage-SFT",
            folder=sft,
            command=[*spread, "train", str(sft / "recipe.yaml")],
            resume=["--resume"],
            recipe=sft_recipe,
        ),
        Step(
            name="evaluate",
            folder=report,
            command=[
                *(*own, "evaluate", str(sft / "model"), recipe.held_out, "--out", str(report / "report")),
                *("--thinking", recipe.evaluate.thinking, "--max-new-tokens", str(recipe.evaluate.max_new_tokens)),
                *("--batch-tokens", str(recipe.evaluate.batch_tokens), *system),
            ],
            resume=[],
        ),
    ]


def run_rise(recipe: RiseRecipe, *, say: Callable[[str], None], dry_run: bool = False) -> list[dict[str, object]]:
    """Carry out what is not done yet; each step's output goes to `log.txt` of its folder.

    Returns:
        One entry per step: name, seconds, whether it was there already.
    Raises:
        DataError, CheckpointError: a file of rows, the expert's answers or the model cannot be read; said before the
            first step, not hours later.
        RecipeError: a finished step was done with other settings. TrainingError: a command failed, or an earlier run is
            still at work in this output directory.
    """
    if dry_run:
        for step in plan_steps(recipe):
            say(f"{step.name}: {shlex.join(step.command)}")
        return []
    steps = plan_steps(recipe)
    _check_inputs(recipe)
    if _done(steps[0]) is None:
        _check_model(recipe.model)
    with _only_run(Path(recipe.output_dir)) as lock:
        return _run_all(steps, say, lock)


def _check_values(recipe: RiseRecipe, label: str) -> None:
    """Refuse what a step's command would refuse, hours later.

    Raises:
        RecipeError: names the setting.
    """
    try:
        split_modes([recipe.evaluate.thinking])
    except DataError as error:
        raise RecipeError(f"{label}: evaluate.thinking: {error}") from None
    least: dict[str, dict[str, float]] = {
        "pass_rates": {"samples": 1, "temperature": 0.01, "max_new_tokens": 1, "batch_tokens": 1},
        "sft_set": {"ratio": 0},
        "evaluate": {"max_new_tokens": 1, "batch_tokens": 1},
    }
    for section, names in least.items():
        for name, bound in names.items():
            value = getattr(getattr(recipe, section), name)
            if value < bound:
                raise RecipeError(f"{label}: {section}.{name} is {value}; expected at least {bound}.")
    chosen = recipe.sft_set
    if (chosen.expert_url is None) != (chosen.expert_model is None):
        raise RecipeError(f"{label}: sft_set.expert_url and sft_set.expert_model go together; one is missing.")
    if chosen.expert_file is not None and chosen.expert_url is not None:
        raise RecipeError(f"{label}: sft_set.expert_file and sft_set.expert_url: choose one.")


def _check_model(model: str) -> None:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model: {model}: there is no model there: {error}") from error


def _check_inputs(recipe: RiseRecipe) -> None:
    for name in ("prompts", "non_thinking", "held_out"):
        try:
            load_records(getattr(recipe, name))
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
    if recipe.sft_set.expert_file is not None:
        answers_from_file(Path(recipe.sft_set.expert_file))


def _run_all(steps: list[Step], say: Callable[[str], None], lock: int) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    for step in steps:
        done = _done(step)
        if done is not None:
            say(f"{step.name}: done before ({done['seconds']:.0f} s)")
            results.append({**done, "skipped": True})
            continue
        say(f"{step.name}: {shlex.join(step.command)}")
        seconds = _run(step, lock)
        entry: dict[str, object] = {"name": step.name, "seconds": seconds, "digest": step.digest}
        (step.folder / DONE).write_text(json.dumps(entry) + "\n", encoding="utf-8")
        say(f"{step.name}: {seconds:.0f} s")
        results.append({**entry, "skipped": False})
    return results


@contextmanager
def _only_run(folder: Path) -> Iterator[int]:
    """Hold the lock of `folder`; its number goes to the commands, so that one that outlives this process holds it too."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"{folder}: another run, or a command that it started, is still at work there. Wait for it, or end it."
            ) from None
        yield file.fileno()


def _done(step: Step) -> dict[str, float] | None:
    file = step.folder / DONE
    if not file.exists():
        return None
    done = json.loads(file.read_text(encoding="utf-8"))
    if done["digest"] != step.digest:
        raise RecipeError(
            f"{step.name} was done with other settings, see {step.folder}. Remove that folder and those of the steps "
            "after it to do them again, or use another output_dir."
        )
    return done


def _run(step: Step, lock: int) -> float:
    begun = (step.folder / "begun").exists()
    step.folder.mkdir(parents=True, exist_ok=True)
    (step.folder / "begun").touch()
    if step.recipe is not None:
        import yaml

        (step.folder / "recipe.yaml").write_text(yaml.safe_dump(step.recipe, sort_keys=False), encoding="utf-8")
    command = [*step.command, *(_resume(step) if begun else [])]
    started = time.monotonic()
    with (step.folder / "log.txt").open("ab") as log:
        finished = subprocess.run(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            pass_fds=[lock],
            check=False,
        )
    if finished.returncode != 0:
        tail = (step.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise TrainingError(
            f"{step.name} failed with status {finished.returncode}; the end of {step.folder / 'log.txt'}:\n"
            + "\n".join(f"  {line}" for line in tail)
            + f"\nStarted again, `rise` goes on with this step; to do all of it anew, remove {step.folder} first."
        )
    return time.monotonic() - started


def _resume(step: Step) -> list[str]:
    """`--resume` needs something to go on from."""
    made = step.folder / "model"
    if not step.resume or (not made.exists() and not list(step.folder.glob("model*"))):
        return []
    if "train" in step.command and newest_checkpoint(made) is None:
        return ["--overwrite"]
    return step.resume


def _stage_recipe(
    stage: Literal["rl", "sft"], recipe: RiseRecipe, model: str, data: str, output_dir: Path
) -> dict[str, object]:
    sections: Mapping[str, object] = getattr(recipe, stage)

    def section(name: str) -> dict[str, object]:
        found = sections.get(name) or {}
        if not isinstance(found, dict):
            raise RecipeError(f"{stage}.{name} is {found!r}. Expected a mapping of settings.")
        return found

    tree: dict[str, object] = {
        "stage": stage,
        "model": {**section("model"), "path": model},
        "data": {"train": [data]},
        "training": {
            **section("training"),
            "output_dir": str(output_dir),
            "system_prompt": recipe.system_prompt or None,
        },
    }
    if sections.get("lora"):
        tree["lora"] = section("lora")
    if sections.get("rewards"):
        tree["rewards"] = sections["rewards"]
    return tree


def recipe_json(recipe: RiseRecipe) -> dict[str, object]:
    """The recipe as it was understood."""
    return asdict(recipe)
