"""The pico study of HDPO: `make study-rl` runs it (CPU, one process of one thread; a few minutes of one core).

Does a policy that calls its tool nearly always learn to call it only where it must? From the same taught start, HDPO
with the efficiency loss (w_tool = 0.15, the reference's) against HDPO without it (w_tool = 0), three seeds; greedy
answers to questions about codes that no training row has. Every stage is done once: started again, the study goes on.

    python examples/study_hdpo.py [--out DIR] [--tiny]

Exit status 1 if the goal is missed.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pico.program import ROOT, environment, write_report
from pico.stages import Json, Study
from pico.tool_task import (
    KINDS,
    LIMITS,
    Lookup,
    StartSettings,
    TaskSettings,
    colors_of_codes,
    evaluate_policy,
    make_policy,
    make_processor,
    rows,
    teach,
    trajectories,
)

logger = logging.getLogger("study")
CURVES = ("reward", "tool_calls", "rewards/accuracy_reward/mean", "entropy", "clip/low", "clip/high")


@dataclass(frozen=True, slots=True, kw_only=True)
class RLSettings:
    """Reinforcement learning, the same in both arms. Ours where nothing else is said."""

    steps: int = 40
    prompts_per_step: int = 16
    num_generations: int = 8
    updates_per_rollout: int = 2  # HDPO
    learning_rate: float = 3e-4
    clip: float = 0.2  # HDPO, both sides


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The sizes of the study."""

    seeds: tuple[int, ...] = (0, 1, 2)
    w_tools: tuple[float, ...] = (0.0, 0.15)  # without, and HDPO's
    task: TaskSettings = field(default_factory=TaskSettings)
    start: StartSettings = field(default_factory=StartSettings)
    rl: RLSettings = field(default_factory=RLSettings)


def tiny_plan() -> Plan:
    """Everything once, with hardly any training."""
    return Plan(
        seeds=(0,),
        task=TaskSettings(train=40, test=20),
        start=StartSettings(steps=3),
        rl=RLSettings(steps=2, prompts_per_step=2, num_generations=4),
    )


def main() -> int:
    """Run the study; 0 if the goal is met."""
    parser = argparse.ArgumentParser(description="HDPO on a toy task: are needless tool calls unlearnt?")
    parser.add_argument(
        "--out", type=Path, default=ROOT / ".cache" / "study-hdpo", metavar="DIR", help="working folder"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/study-hdpo.json", metavar="FILE")
    parser.add_argument("--image", type=Path, default=ROOT / "docs/images/study-hdpo.png", metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="a few steps: tries the machinery, meets no goal")
    arguments = parser.parse_args()
    report = run_study(arguments.out, tiny_plan() if arguments.tiny else Plan())
    write_report(arguments.json, report)
    draw(report, arguments.image)
    print_report(report)
    return 0 if report["passed"] else 1


def run_study(out: Path, plan: Plan) -> Json:
    """All seeds and both arms; what was done before is read."""
    import torch

    torch.set_num_threads(1)
    study = Study(out)
    runs = [run_seed(study, plan, seed) for seed in plan.seeds]
    goals = [goal for run in runs for goal in judge(run, plan)]
    return {
        "passed": all(goal["met"] for goal in goals),
        "goals": goals,
        "plan": asdict(plan),
        "seeds": runs,
        "cpu_seconds": sum(stage["cpu_seconds"] for run in runs for stage in (run["start"], *run["arms"].values())),
        "environment": environment(threads=1),
    }


def run_seed(study: Study, plan: Plan, seed: int) -> Json:
    """Teach a start, train both arms from it, ask all three the held-out questions."""
    start = f"start-{seed}"

    def teach_it(folder: Path) -> Json:
        processor = make_processor()
        model = make_policy(processor, seed=seed)
        taught = trajectories(processor, rows(plan.task, "train"), plan.start, seed=seed)
        losses = teach(model, taught, plan.start, seed=seed)
        model.save_pretrained(folder)
        return {"loss": losses[-1], "test": evaluate_policy(model, processor, rows(plan.task, "test"))}

    found: Json = {
        "seed": seed,
        "start": study.stage(start, teach_it, settings=[asdict(plan.task), asdict(plan.start), seed]),
    }
    arms = {}
    for w_tool in plan.w_tools:

        def train_it(folder: Path, w_tool: float = w_tool) -> Json:
            return train_arm(folder, study.directory(start), plan, w_tool=w_tool, seed=seed)

        name = f"rl-{w_tool:g}-{seed}"
        arms[f"{w_tool:g}"] = study.stage(name, train_it, settings=[asdict(plan.rl), w_tool, seed], after=(start,))
    return found | {"arms": arms}


def train_arm(folder: Path, start: Path, plan: Plan, *, w_tool: float, seed: int) -> Json:
    """HDPO with the package's trainer, then greedy answers to the held-out questions."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from metis_home.training.rl import MetisRLConfig, MetisRLTrainer

    processor = make_processor()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(start)
    config = MetisRLConfig(
        output_dir=str(folder),
        advantage="hdpo",
        w_tool=w_tool,
        reward_weights=[0.9, 0.1, 0.0],
        num_generations=plan.rl.num_generations,
        prompts_per_step=plan.rl.prompts_per_step,
        updates_per_rollout=plan.rl.updates_per_rollout,
        clip_low=plan.rl.clip,
        clip_high=plan.rl.clip,
        dynamic_sampling=False,
        learning_rate=plan.rl.learning_rate,
        max_steps=plan.rl.steps,
        max_completion_tokens=LIMITS.response_tokens,
        max_observation_tokens=LIMITS.observation_tokens,
        max_tool_turns=LIMITS.turns - 1,
        tool_workers=1,
        describe_tools=False,
        system_prompt=None,
        per_device_train_batch_size=64,
        seed=seed,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        log_completions=False,
        plots=False,
        disable_tqdm=True,
    )
    trainer = MetisRLTrainer(
        model,
        config,
        ["accuracy_reward", "format_reward", "efficiency_reward"],
        rows(plan.task, "train"),
        processor,
        tools=[Lookup(colors_of_codes())],
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "tool_calls" in entry]
    curves = {name: [entry[name] for entry in log if name in entry] for name in CURVES}
    return {"test": evaluate_policy(model.eval(), processor, rows(plan.task, "test")), "curves": curves}


def judge(run: Json, plan: Plan) -> list[Json]:
    """The goal, for one seed: at most half the calls per right answer, at equal or better accuracy."""
    without, with_tool = (run["arms"][f"{w_tool:g}"]["test"] for w_tool in plan.w_tools)
    calls = without["calls_per_right_answer"]
    ratio = (
        with_tool["calls_per_right_answer"] / calls if calls and with_tool["accuracy_all"] else 1.0
    )  # nothing to halve
    gain = with_tool["accuracy_all"] - without["accuracy_all"]
    return [
        {
            "seed": run["seed"],
            "name": "calls per right answer, ratio",
            "found": ratio,
            "wanted": "<= 0.5",
            "met": ratio <= 0.5,
        },
        {"seed": run["seed"], "name": "accuracy, difference", "found": gain, "wanted": ">= 0", "met": gain >= 0},
    ]


def draw(report: Json, path: Path) -> None:
    """Tool turns during training, and what the held-out questions say, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [f"{w_tool:g}" for w_tool in report["plan"]["w_tools"]]
    colors = dict(zip(names, ("tab:gray", "tab:blue"), strict=True))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    for run in report["seeds"]:
        for name in names:
            calls = run["arms"][name]["curves"]["tool_calls"]
            left.plot(calls, color=colors[name])
    left.set(xlabel="batches of rollouts", ylabel="tool turns per rollout", ylim=(0, None), title="training (sampled)")
    bars = [("start", "lightgray", [run["start"]["test"] for run in report["seeds"]])]
    bars += [
        (f"w_tool = {name}", colors[name], [run["arms"][name]["test"] for run in report["seeds"]]) for name in names
    ]
    for axis, what, title in (
        (middle, "accuracy", "accuracy, held out"),
        (right, "calls", "tool turns a question, held out"),
    ):
        for place, (label, color, tests) in enumerate(bars):
            _bars(axis, place, [[test[f"{what}_{kind}"] for test in tests] for kind in ("all", *KINDS)], color, label)
        axis.set(xticks=[0.25, 1.25, 2.25], xticklabels=["all", *KINDS], title=title)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(bars), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axis: Any, place: int, values: Sequence[Sequence[float]], color: str, label: str) -> None:
    """One bar per kind: the mean over seeds, the seeds themselves as points."""
    for number, seeds in enumerate(values):
        at = number + 0.25 * place
        axis.bar(at, sum(seeds) / len(seeds), 0.23, color=color, label=label if number == 0 else None)
        axis.plot([at] * len(seeds), seeds, "k.", markersize=3)


def print_report(report: Json) -> None:
    """The numbers and the goal, on stdout."""
    for run in report["seeds"]:
        for name, test in [("start", run["start"]["test"]), *((n, arm["test"]) for n, arm in run["arms"].items())]:
            print(
                f"seed {run['seed']}  {'w_tool = ' + name if name != 'start' else name:14}"
                f"accuracy {test['accuracy_all']:.3f} (told {test['accuracy_told']:.3f}, lookup "
                f"{test['accuracy_lookup']:.3f})  calls per right answer {test['calls_per_right_answer']:.3f} "
                f"(told {test['calls_told']:.3f}, lookup {test['calls_lookup']:.3f})"
            )
    for goal in report["goals"]:
        verdict = "met" if goal["met"] else "MISSED"
        print(f"seed {goal['seed']}  {goal['name']:32} {goal['found']:7.3f}  {goal['wanted']:7} {verdict}")
    print(f"{'met' if report['passed'] else 'MISSED'} ({report['cpu_seconds']:.0f} s of one core)")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    started = time.perf_counter()
    status = main()
    logger.info("%.0f s", time.perf_counter() - started)
    sys.exit(status)
