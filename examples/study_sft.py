"""The pico study of Stage-SFT: `make study` (CPU, two processes; about 20 minutes on two cores).

Two families of questions share wordings and image style; one object is read directly, several need reasoning. A dense
pico Qwen2.5-VL that always thinks is taught both, upcycled, trained with Stage-SFT, and answers held-out queries with
thinking auto, on and off. Three seeds; a control whose modes are dealt out at random; routers that see only the words;
mean against attention pooling (the goals are those of the package's default). Every stage is done once: started again,
the study goes on where it stopped.

    python examples/study_sft.py [--out DIR] [--workers 2] [--tiny]

Exit status 1 if a goal is missed.
"""

import logging
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pico.dense import DenseSettings, TowerSettings, train_dense, write_encoded, write_tower
from pico.families import Sizes, write_families
from pico.program import environment, one_thread, run_jobs, shared_arguments, write_report
from pico.sft import (
    SFTSettings,
    answers,
    check,
    image_hashes,
    read,
    shuffled,
    train_router_alone,
    train_sft,
    upcycled,
    without_images,
    words_alone,
)
from pico.stages import Json, Study
from pico.summary import judge, summarize

from metis_home.router_layout import DEFAULT_POOLING

logger = logging.getLogger("study")
MODES = ("auto", "on", "off")
POOLINGS = ("mean", "attention")
CONTROL_SEED = 0


def main() -> int:
    """Run the study; 0 if every goal is met."""
    arguments = shared_arguments("Stage-SFT on a pico model: does the router choose well?", "study-sft.json")
    started = time.perf_counter()
    one_thread()
    plan = tiny_plan() if arguments.tiny else Plan()

    shared = Study(arguments.out)
    text_only = prepare(shared, plan)
    jobs = [(arguments.out, plan, seed, False) for seed in plan.seeds] + [(arguments.out, plan, CONTROL_SEED, True)]
    *runs, control = run_jobs(run_seed, jobs, arguments.workers)

    report = conclude(plan, text_only, runs, control)
    report["seconds"] = time.perf_counter() - started
    report["cpu_seconds"] = shared.cpu_seconds(lambda stage: not stage.startswith(("rl-", "rise")))
    report["environment"] = environment(workers=arguments.workers)
    write_report(arguments.json, report)
    from pico.figures import draw

    draw(report, arguments.images)
    print_report(report)
    return 0 if report["passed"] else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The sizes of the study. All numbers are ours."""

    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = field(default_factory=Sizes)
    tower: TowerSettings = field(default_factory=TowerSettings)
    dense: DenseSettings = field(default_factory=DenseSettings)
    sft: SFTSettings = field(default_factory=SFTSettings)


def tiny_plan() -> Plan:
    """Everything once, with hardly any training."""
    return Plan(
        seeds=(0,),
        sizes=Sizes(dense=24, sft=24, test=12, templates=6),
        tower=TowerSettings(pictures=40, steps=3),
        dense=DenseSettings(steps=3),
        sft=SFTSettings(steps=3, router_steps=3, max_new_tokens=6),
    )


def prepare(study: Study, plan: Plan) -> Json:
    """What all seeds share: data, vision tower, and how far the words alone lead."""

    def data(folder: Path) -> Json:
        write_families(folder, plan.sizes)
        train, *held_out = [image_hashes(folder, part) for part in ("sft", "test", "templates")]
        dense = image_hashes(folder, "dense")
        return {"held_out_images_seen_in_training": sum(len((train | dense) & part) for part in held_out)}

    def words(_: Path) -> Json:
        train = read(study.directory("data"), "sft")
        return {part: words_alone(train, read(study.directory("data"), part)) for part in ("test", "templates")}

    def tower(folder: Path) -> Json:
        right = write_tower(folder, study.directory("data") / "dense.jsonl", plan.tower)
        return {"cells_named_rightly": right}

    def encoded(folder: Path) -> Json:
        check(study.directory("data"), study.directory("tower"), "sft")
        rows = study.directory("data") / "dense.jsonl"
        return {"rows": write_encoded(folder / "dense.pt", study.directory("tower"), rows)}

    shared = study.stage("data", data, settings=plan.sizes)
    shared |= study.stage("words", words, after=("data",))
    shared |= study.stage("tower", tower, settings=plan.tower, after=("data",))
    study.stage("encoded", encoded, after=("data", "tower"))
    return shared


def run_seed(out: Path, plan: Plan, seed: int, is_control: bool) -> Json:
    """Everything of one seed, or its control; the stages of other processes are read, never run."""
    study = Study(out)
    prepare(study, plan)
    data = study.directory("data")
    dense = f"dense-{seed}"
    found: Json = {"seed": seed}

    def answer_dense(folder: Path) -> Json:
        return summarize(answers(study.directory(dense), folder, read(data, "test"), ["auto"], plan.sft.max_new_tokens))

    found["dense"] = dense_stage(study, plan.dense, seed)
    if is_control:
        return found | {"control": train_and_answer(study, plan, seed, DEFAULT_POOLING, name="control", modes=MODES)}
    found["dense_answers"] = study.stage(
        f"dense-answers-{seed}", answer_dense, settings=plan.sft.max_new_tokens, after=(dense, "data")
    )
    for pooling in POOLINGS:
        modes = MODES if pooling == DEFAULT_POOLING else ("auto",)
        found[pooling] = train_and_answer(study, plan, seed, pooling, name=f"sft-{pooling}", modes=modes)
    found["router_alone"] = {pooling: router_alone(study, plan, seed, pooling) for pooling in POOLINGS}
    found["router_text_only"] = router_alone(study, plan, seed, DEFAULT_POOLING, text_only=True)
    return found


def dense_stage(study: Study, settings: DenseSettings, seed: int) -> Json:
    """Train the dense model of a seed: the stage `dense-<seed>`."""

    def train_it(folder: Path) -> Json:
        return train_dense(
            folder, study.directory("tower"), study.directory("encoded") / "dense.pt", settings, seed=seed
        )

    return study.stage(f"dense-{seed}", train_it, settings=[asdict(settings), seed], after=("tower", "encoded"))


def train_and_answer(study: Study, plan: Plan, seed: int, pooling: str, *, name: str, modes: tuple[str, ...]) -> Json:
    """Upcycle, Stage-SFT, answers to the held-out queries; `control` deals out the modes at random."""
    start = upcycle_stage(study, seed, pooling)
    longest = plan.sft.max_new_tokens
    trained, answered = f"{name}-{seed}", f"{name}-answers-{seed}"
    data = study.directory("data")

    def train_it(folder: Path) -> Json:
        records = read(data, "sft")
        records = shuffled(records, seed) if name == "control" else records
        return train_sft(study.directory(start), folder, records, plan.sft, seed=seed)

    def answer(folder: Path) -> Json:
        test = answers(study.directory(trained), folder / "test", read(data, "test"), modes, longest)
        templates = answers(study.directory(trained), folder / "templates", read(data, "templates"), ["auto"], longest)
        return {"test": summarize(test), "templates": summarize(templates)}

    curves = study.stage(trained, train_it, settings=[asdict(plan.sft), seed], after=(start, "data"))
    return {"curves": curves, **study.stage(answered, answer, settings=[*modes, longest], after=(trained, "data"))}


def router_alone(study: Study, plan: Plan, seed: int, pooling: str, *, text_only: bool = False) -> Json:
    """A router trained by itself on the dense model's frozen features, or on those of the words alone."""
    start = upcycle_stage(study, seed, pooling)
    data = study.directory("data")

    def train_it(folder: Path) -> Json:
        train, test = read(data, "sft"), read(data, "test")
        if text_only:
            train, test = without_images(train), without_images(test)
        return train_router_alone(study.directory(start), folder, train, test, plan.sft, seed=seed)

    name = f"router-{'words' if text_only else pooling}-{seed}"
    return study.stage(name, train_it, settings=[asdict(plan.sft), seed], after=(start, "data"))


def upcycle_stage(study: Study, seed: int, pooling: str) -> str:
    """Make the two-branch model that a training starts from; return the stage's name."""
    name, dense = f"start-{pooling}-{seed}", f"dense-{seed}"
    study.stage(
        name, lambda folder: upcycled(study.directory(dense), folder, pooling=pooling, seed=seed), after=(dense,)
    )
    return name


def conclude(plan: Plan, shared: Json, runs: list[Json], control: Json) -> Json:
    """The goals, seed by seed, and the control, which must miss them."""
    seeds = []
    for run in runs:
        text_only = max(shared["test"], run["router_text_only"]["router_accuracy"])
        seeds.append({**run, "goals": [asdict(goal) for goal in judge(run[DEFAULT_POOLING]["test"], text_only)]})
    failing = [asdict(goal) for goal in judge(control["control"]["test"], shared["test"])]
    by_name = {goal["name"]: goal["met"] for goal in failing}
    control_fails = not by_name["router accuracy"] and not by_name["router minus text-only router"]
    return {
        "passed": control_fails and all(goal["met"] for seed in seeds for goal in seed["goals"]),
        "control_fails": control_fails,
        "pooling": DEFAULT_POOLING,
        "plan": asdict(plan),
        "shared": shared,
        "seeds": seeds,
        "control": {**control, "goals": failing},
    }


def print_report(report: Json) -> None:
    """The goals, on stdout."""
    for run in report["seeds"]:
        for goal in run["goals"]:
            print(
                f"seed {run['seed']}  {goal['name']:34} {goal['found']:8.4f}  {goal['wanted']:9} {_verdict(goal['met'])}"
            )
    for goal in report["control"]["goals"]:
        print(f"control {goal['name']:34} {goal['found']:8.4f}  {goal['wanted']:9} {_verdict(goal['met'])}")
    print(f"control fails, as it must: {report['control_fails']}")
    print(f"all goals: {_verdict(report['passed'])} ({report['seconds']:.0f} s)")


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    sys.exit(main())
