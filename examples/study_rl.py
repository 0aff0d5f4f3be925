"""The pico study of Stage-RL and of RISE: `make study-rl` runs it, and then the study of HDPO (CPU, two processes).

GRPO with verified rewards begins with the dense models of the study of Stage-SFT (whose folder is shared), taught
further on rows where most reasoning questions are answered without their derivation: they can reason and mostly do not
(`pico/hasty.py`). Three seeds. Two controls of each, whose reward is a coin, must not get better. Judged on held-out
greedy answers, never on the training reward. Then `metis-home rise`, killed once in the middle of Stage-RL and started
again. Every stage is done once: started again, the study goes on where it stopped.

    python examples/study_rl.py [--out DIR] [--workers 2] [--tiny]

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

import study_sft
from pico.dense import DenseSettings, train_dense, write_encoded
from pico.families import write_part
from pico.hasty import write_hasty_rows
from pico.program import environment, one_thread, run_jobs, shared_arguments, write_report
from pico.rl import RLSettings, judge_control, judge_controls, judge_rl, measure, train_grpo
from pico.rl_rise import RiseSettings, run_pipeline, write_rise_data
from pico.sft import image_hashes, read
from pico.stages import Json, Study
from study_sft import dense_stage, prepare

logger = logging.getLogger("study")
RISE_SEED = 0
SHARED = ("data", "words", "tower", "encoded")


def main() -> int:
    """Run the study; 0 if every goal is met."""
    arguments = shared_arguments("Stage-RL and RISE on pico models: does verified reward teach?", "study-rl.json")
    started = time.perf_counter()
    one_thread()
    plan = tiny_plan() if arguments.tiny else Plan()

    data = prepare_rl(Study(arguments.out), plan)
    jobs = [(arguments.out, plan, seed, coin) for coin in (None, *plan.coins) for seed in plan.base.seeds]
    runs = run_jobs(run_seed, jobs, arguments.workers)
    seeds, controls = runs[: len(plan.base.seeds)], runs[len(plan.base.seeds) :]
    report = conclude(Study(arguments.out), plan, data, seeds, controls, run_rise(arguments.out, plan))
    report["seconds"] = time.perf_counter() - started
    report["environment"] = environment(workers=arguments.workers)
    write_report(arguments.json, report)
    from pico.rl_figures import draw

    draw(report, arguments.images)
    print_report(report)
    return 0 if report["passed"] else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The sizes of the study; `base` is what it shares with the study of Stage-SFT. All numbers are ours."""

    base: study_sft.Plan = field(default_factory=study_sft.Plan)
    rl: RLSettings = field(default_factory=RLSettings)
    hasty_share: float = 0.85
    """Share of the reasoning rows without derivation in what the start is taught."""
    start: DenseSettings = field(default_factory=lambda: DenseSettings(steps=150, learning_rate=5e-4, warmup_steps=20))
    """How the dense models of the study of Stage-SFT are taught further on those rows."""
    rise: RiseSettings = field(default_factory=RiseSettings)
    coins: tuple[int, ...] = (0, 1)
    """Controls of every seed."""


def tiny_plan() -> Plan:
    """Everything once, with hardly any training."""
    rl = RLSettings(
        prompts=8, steps=2, prompts_per_step=2, generations=2, max_new_tokens=6, samples=2, sampled_prompts=2
    )
    rise = RiseSettings(
        prompts=6,
        non_thinking=6,
        held_out=4,
        overrides=(
            *("rl.training.max_steps=3", "rl.training.save_steps=1", "rl.training.prompts_per_step=2"),
            *("rl.training.num_generations=2", "rl.training.max_completion_tokens=6", "pass_rates.max_new_tokens=6"),
            *("pass_rates.samples=2", "sft.training.max_steps=2", "evaluate.max_new_tokens=6"),
        ),
    )
    return Plan(base=study_sft.tiny_plan(), rl=rl, rise=rise, start=DenseSettings(steps=3))


def prepare_rl(study: Study, plan: Plan) -> Json:
    """What all seeds share: the data of the study of Stage-SFT, and fresh prompts."""
    prepare(study, plan.base)

    def prompts(folder: Path) -> Json:
        write_part(folder, "rl", plan.rl.prompts)
        fresh = image_hashes(folder, "rl")
        seen = {part: len(fresh & image_hashes(study.directory("data"), part)) for part in ("test", "templates")}
        return {"held_out_images_among_prompts": seen}

    def start_rows(folder: Path) -> Json:
        rows = folder / "rows.jsonl"
        hasty = write_hasty_rows(rows, study.directory("data") / "dense.jsonl", plan.hasty_share)
        return {"hasty_rows": hasty, "start_rows": write_encoded(folder / "start.pt", study.directory("tower"), rows)}

    shared = study.stage("rl-data", prompts, settings=plan.rl.prompts, after=("data",))
    return shared | study.stage("rl-start-rows", start_rows, settings=plan.hasty_share, after=("data", "tower"))


def run_seed(out: Path, plan: Plan, seed: int, coin: int | None) -> Json:
    """The dense model of a seed before and after Stage-RL, or after the control with this coin."""
    study = Study(out)
    prepare_rl(study, plan)
    dense = start_stage(study, plan, seed)
    name = f"rl-{seed}" if coin is None else f"rl-control-{seed}-{coin}"

    def train_it(folder: Path) -> Json:
        records = read(study.directory("rl-data"), "rl")
        return train_grpo(study.directory(dense), folder, records, plan.rl, seed=seed, coin=coin)

    curves = study.stage(name, train_it, settings=[asdict(plan.rl), seed], after=(dense, "rl-data"))
    before, after = (measure_stage(study, plan, model, seed) for model in (dense, name))
    return {"seed": seed, "coin": coin, "before": before, "after": after, "curves": curves}


def start_stage(study: Study, plan: Plan, seed: int) -> str:
    """Teach the model that Stage-RL begins with; return the stage's name."""
    dense_stage(study, plan.base.dense, seed)
    dense, name = f"dense-{seed}", f"rl-start-{seed}"

    def teach(folder: Path) -> Json:
        rows = study.directory("rl-start-rows") / "start.pt"
        return train_dense(folder, study.directory(dense), rows, plan.start, seed=seed, tower_only=False)

    study.stage(name, teach, settings=[asdict(plan.start), seed], after=(dense, "rl-start-rows"))
    return name


def measure_stage(study: Study, plan: Plan, model: str, seed: int) -> Json:
    """Greedy and sampled answers of a stage's model to the held-out queries."""

    def measure_it(folder: Path) -> Json:
        test = read(study.directory("data"), "test")
        return measure(study.directory(model), folder, test, plan.rl, seed=seed)

    settings = [plan.rl.max_new_tokens, plan.rl.samples, plan.rl.sampled_prompts, seed]
    return study.stage(f"{model}-measured", measure_it, settings=settings, after=(model, "data"))


def run_rise(out: Path, plan: Plan) -> Json:
    """All of `metis-home rise`, begun with the dense model of one seed."""
    study = Study(out)
    prepare_rl(study, plan)
    dense = start_stage(study, plan, RISE_SEED)

    def rows(folder: Path) -> Json:
        return write_rise_data(folder, study.directory("rl-data"), study.directory("data"), plan.rise)

    def pipeline(folder: Path) -> Json:
        return run_pipeline(folder, study.directory(dense), study.directory("rise-data"), plan.rise)

    counts = study.stage("rise-data", rows, settings=plan.rise, after=("rl-data", "data"))
    return {
        "data": counts,
        **study.stage("rise", pipeline, settings=plan.rise, after=("rise-data", dense)),
    }


def is_used(stage: str) -> bool:
    """Is a stage of the shared folder one that this study builds on?"""
    return stage in SHARED or stage.startswith(("rl-", "rise")) or stage.removeprefix("dense-").isdigit()


def conclude(study: Study, plan: Plan, data: Json, seeds: list[Json], controls: list[Json], rise: Json) -> Json:
    """The goals, seed by seed, and the controls, which must not rise."""
    for run in seeds:
        run["goals"] = [asdict(goal) for goal in judge_rl(run["before"], run["after"])]
    for run in controls:
        run["goals"] = [asdict(goal) for goal in judge_control(run["before"], run["after"])]
    for run in [*seeds, *controls]:
        for measured in (run["before"], run["after"]):
            measured.pop("right", None)
    together = judge_controls([run["goals"][0]["found"] for run in controls])
    met = together.met and all(goal["met"] for run in [*seeds, *controls] for goal in run["goals"])
    return {
        "passed": met and rise["resumed"] and rise["finished"],
        "plan": asdict(plan),
        "data": data,
        "seeds": seeds,
        "controls": controls,
        "controls_together": asdict(together),
        "rise": rise,
        "cpu_seconds": {
            "grpo": sum(run["curves"]["cpu_seconds"] for run in seeds),
            "controls": sum(run["curves"]["cpu_seconds"] for run in controls),
            "rise": rise["cpu_seconds_of_commands"],
            "everything": study.cpu_seconds(is_used) + rise["cpu_seconds_of_commands"],
        },
    }


def print_report(report: Json) -> None:
    """The goals, on stdout."""
    goals = [(f"seed {run['seed']}", goal) for run in report["seeds"] for goal in run["goals"]]
    goals += [(f"control {run['seed']}, coin {run['coin']}", run["goals"][0]) for run in report["controls"]]
    for name, goal in [*goals, ("controls", report["controls_together"])]:
        verdict = "met" if goal["met"] else "MISSED"
        print(f"{name:17} {goal['name']:46} {goal['found']:8.4f}  {goal['wanted']:22} {verdict}")
    rise = report["rise"]
    print(f"rise: killed in Stage-RL and gone on from its checkpoint: {rise['resumed']}; finished: {rise['finished']}")
    for mode, group in rise["summary"]["modes"].items():
        print(f"rise, thinking {mode:4}: accuracy {group['accuracy']['value']:.3f}, {group['mean_tokens']:.1f} tokens")
    print(f"all goals: {'met' if report['passed'] else 'MISSED'} ({report['seconds']:.0f} s)")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    sys.exit(main())
