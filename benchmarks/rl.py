"""Where a step of Stage-RL goes, and how long it takes beside TRL's `GRPOTrainer`.

    python benchmarks/rl.py [--trl-python PYTHON] [--json FILE] [--rounds 12]        (tests/trl/run.sh makes such one)

The same tiny dense Qwen2.5-VL, taught for a moment so that its answers have a format and different lengths; the same
prompts (half with images), group size, sampling, rewards and learning rate. Each variant is a real trainer in a process
of its own; the processes take turns, one optimizer step with its rollouts each, so that a noisy machine disturbs all
alike. Reported are medians over the rounds of the ratio of wall times, and of processor times, which a busy machine
changes less.

    ours         MetisRLTrainer, micro-batches of a group's size
    trl          TRL as `metis-home export-recipe --to trl` sets it up: micro-batches of a group's size
    trl_whole    TRL with all rollouts of the step in one forward

Chosen so that TRL loses nothing by what it has not: no dynamic sampling, and a reward that tells the rollouts of every
group apart, so that no rollout of ours can be left out of the update. Neither recomputes activations.

Waste: the share of rows in decoding steps that had already ended, the share of tokens in the update's forwards that are
padding, and the share of the step's time that belongs to no stage.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks import rl_trainers, turns  # noqa: E402

VARIANTS = ("ours", "trl", "trl_whole")
STAGES = ("rollout", "reward", "prepare", "update")
GOAL = 1.3
LOSS_TOLERANCE = 1e-5


def main() -> None:
    """Run all variants in turns and print times, ratios and shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of an environment with TRL")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        loss = rl_trainers.write_model(model)
        pythons = {name: sys.executable if name == "ours" else arguments.trl_python for name in VARIANTS}
        commands = {name: [pythons[name], __file__, "--worker", name, "--model", str(model)] for name in VARIANTS}
        environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "HF_HUB_OFFLINE": "1"}
        steps = turns.take_turns(commands, arguments.rounds, environment)
        equality = compare_losses(arguments.trl_python, Path(folder) / "equality.json")
    report = summarise(steps, arguments.rounds, loss, equality)
    report["machine"]["trl"] = trl_version(arguments.trl_python)
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def compare_losses(python: str, out: Path) -> dict[str, dict]:
    """What benchmarks/rl_equality.py found."""
    script = Path(__file__).with_name("rl_equality.py")
    subprocess.run([python, str(script), "--json", str(out)], check=True, stdout=sys.stderr)
    return json.loads(out.read_text())


def trl_version(python: str) -> str:
    """Of TRL in that environment."""
    command = [python, "-c", "import importlib.metadata as m; print(m.version('trl'))"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def summarise(
    steps: dict[str, list[dict[str, float]]], rounds: int, loss: float, equality: dict[str, dict]
) -> dict[str, dict]:
    """Ratios per round with their spread, what a step of each variant consists of, and the comparison of losses."""
    ratios = {
        f"{other} / ours, {unit}": _spread(
            [theirs[unit] / ours[unit] for ours, theirs in zip(steps["ours"], steps[other], strict=True)]
        )
        for other in VARIANTS[1:]
        for unit in ("seconds", "cpu_seconds")
    }
    differences = [max(result["loss_difference"], result["gradient_difference"]) for result in equality.values()]
    return {
        "machine": turns.machine(),
        "settings": {
            **rl_trainers.TEXT,
            "prompts": rl_trainers.PROMPTS,
            "rollouts": rl_trainers.ROLLOUTS,
            "max_new_tokens": rl_trainers.NEW_TOKENS,
            "image_pixels": rl_trainers.IMAGE_PIXELS,
            "rounds": rounds,
            "loss_after_teaching": loss,
        },
        "goal": GOAL,
        "ratios": ratios,
        "step": {name: _describe(values) for name, values in steps.items()},
        "equal_losses": {"tolerance": LOSS_TOLERANCE, "largest_difference": max(differences), **equality},
    }


def _spread(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    last = len(values) - 1
    return {"median": statistics.median(values), "p20": values[int(0.2 * last)], "p80": values[round(0.8 * last)]}


def _describe(steps: list[dict[str, float]]) -> dict[str, float]:
    """Medians of the times; shares and lengths over all steps."""
    total = {name: sum(step[name] for step in steps) for name in steps[0]}
    stages = {f"{stage}_seconds": statistics.median([step[stage] for step in steps]) for stage in STAGES}
    return {
        "seconds": statistics.median([step["seconds"] for step in steps]),
        "cpu_seconds": statistics.median([step["cpu_seconds"] for step in steps]),
        **stages,
        "answer_tokens": total["answer_tokens"] / total["answers"],
        "milliseconds_per_answer_token": 1000 * total["seconds"] / total["answer_tokens"],
        "prompt_tokens_prefilled": total["prefill_tokens"] / len(steps),
        "waste_ended_rows": 1 - total["answer_tokens"] / total["decode_rows"],
        "waste_padding": 1 - total["update_tokens"] / total["update_places"],
        "waste_outside_stages": 1 - sum(total[stage] for stage in STAGES) / total["seconds"],
        "peak_bytes": steps[-1]["peak_bytes"],
    }


def show(report: dict) -> None:
    """Print what matters."""
    for case, ratio in report["ratios"].items():
        print(
            f"{case:28} {ratio['median']:.2f}  (p20 {ratio['p20']:.2f}, p80 {ratio['p80']:.2f})  goal {report['goal']}"
        )
    for name, step in report["step"].items():
        stages = ", ".join(f"{stage} {step[f'{stage}_seconds']:.3f}" for stage in STAGES)
        print(
            f"{name:10} {step['seconds']:.3f} s a step ({stages}), {step['answer_tokens']:.0f} tokens an answer; waste: "
            f"{step['waste_ended_rows']:.0%} ended rows, {step['waste_padding']:.0%} padding, "
            f"{step['waste_outside_stages']:.0%} of the time outside stages"
        )
    equal = report["equal_losses"]
    print(
        f"equal rollouts: losses and gradients differ by {equal['largest_difference']:.1e} (at most {equal['tolerance']})"
    )


def work(variant: str, folder: Path) -> None:
    """One trainer; a step whenever the parent says so."""
    channel = turns.result_channel()

    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    processor, model = rl_trainers.load(folder)
    numbers: dict[str, float] = defaultdict(float)

    def describe() -> dict[str, float]:
        taken = dict(numbers)
        numbers.clear()
        # What contains another stage was timed with it.
        inner = taken["rollout"] + taken["reward"]
        return {**taken, "prepare": taken["filling"] - inner, "update": taken["step"] - taken["filling"]}

    callbacks = [turns.turn_callback(channel, describe)]
    with tempfile.TemporaryDirectory() as out:
        common = (model, processor, rl_trainers.rows(), rl_trainers.rewards(), Path(out))
        if variant == "ours":
            watch_ours(rl_trainers.our_trainer(*common, callbacks=callbacks), numbers).train()
            return
        whole = rl_trainers.PROMPTS * rl_trainers.ROLLOUTS
        fields = {"per_device_train_batch_size": whole, "gradient_accumulation_steps": 1}
        chosen = fields if variant == "trl_whole" else {}
        watch_trl(rl_trainers.trl_trainer(*common, callbacks=callbacks, **chosen), numbers).train()


def watch_ours(trainer, numbers: dict[str, float]):
    """Time the stages of `MetisRLTrainer` and count its tokens."""

    def count_rollouts(groups, prompts, *args) -> None:
        lengths = [len(rollout.completion_ids) for group in groups for rollout in group]
        numbers["answers"] += len(lengths)
        numbers["answer_tokens"] += sum(lengths)
        numbers["decode_rows"] += decoded_rows(lengths)
        numbers["prefill_tokens"] += len(prompts) * max(len(prompt) for prompt in prompts)

    def count_update(*args) -> None:
        buffer = trainer.buffer
        for micro_batch in buffer.steps[buffer.next_step - 1].micro_batches:
            lengths = [len(buffer.samples[row.sample].rollout) for row in micro_batch]
            numbers["update_tokens"] += sum(lengths)
            numbers["update_places"] += len(lengths) * max(lengths)

    timed(trainer.engine, "generate", "rollout", numbers, count_rollouts)
    timed(trainer.scorer, "score", "reward", numbers)
    timed(trainer, "_fill", "filling", numbers)
    timed(trainer, "training_step", "step", numbers, count_update)
    return trainer


def watch_trl(trainer, numbers: dict[str, float]):
    """The same of `GRPOTrainer`, whose batches are padded to the longest prompt and the longest answer of the step."""

    def count_rollouts(result, prompt_ids, *args) -> None:
        prompts, answers = [len(ids) for ids in prompt_ids], [len(ids) for ids in result[0]]
        numbers["answers"] += len(answers)
        numbers["answer_tokens"] += sum(answers)
        numbers["decode_rows"] += len(answers) * max(answers)
        numbers["prefill_tokens"] += len(prompts) * max(prompts)
        numbers["update_tokens"] += sum(prompts) + sum(answers)
        numbers["update_places"] += len(answers) * (max(prompts) + max(answers))

    timed(trainer, "_generate_single_turn", "rollout", numbers, count_rollouts)
    timed(trainer, "_calculate_rewards", "reward", numbers)
    timed(trainer, "_prepare_inputs", "filling", numbers)
    timed(trainer, "training_step", "step", numbers)
    return trainer


def timed(
    owner: object, method: str, stage: str, numbers: dict[str, float], count: Callable[..., None] | None = None
) -> None:
    """Replace a method by one that adds its seconds to a stage, and counts what went in and came out."""
    original = getattr(owner, method)

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = original(*args, **kwargs)
        numbers[stage] += time.perf_counter() - start
        if count is not None:
            count(result, *args)
        return result

    setattr(owner, method, wrapper)


def decoded_rows(lengths: list[int]) -> int:
    """Rows times decoding steps of our engine for answers of these lengths: ended rows leave when a quarter has ended."""
    from metis_home.training.rollouts.decoding import _DROP_SHARE

    rows, total, left = len(lengths), 0, sorted(lengths)
    for step in range(1, max(lengths) + 1):
        total += rows
        going = sum(length > step for length in left)
        if going <= (1 - _DROP_SHARE) * rows:
            rows = going
    return total


if __name__ == "__main__":
    main()
