"""Do `MetisRLTrainer` and TRL's `GRPOTrainer` compute the same losses and gradients for the same rollouts?

    python benchmarks/rl_equality.py [--json FILE]           (an environment with TRL: tests/trl/run.sh makes one)

Both get the same prompts (half with images), the same completions from outside (our engine protocol, TRL's
`rollout_func`) and the same rewards, and update twice on each batch: the second time the ratios are no longer 1 and some
are clipped. Compared at every optimizer step: the loss, and the gradient of every parameter, vision tower included.

Two things are made equal that differ by intent. Our distribution leaves out the image tokens, which are never sampled;
TRL's does not: here it does not either. TRL adds 1e-4 to a group's standard deviation, we add 1e-6: the rewards are in
the thousands, so that neither counts.
"""

import argparse
import json
import random
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks import rl_trainers  # noqa: E402

AGGREGATIONS = {"token_mean": "dapo", "sequence_mean": "grpo", "dr_grpo": "dr_grpo"}
PROMPTS, ROLLOUTS, NEW_TOKENS, STEPS = 4, 4, 24, 4
SHARED = {
    "num_generations": ROLLOUTS,
    "per_device_train_batch_size": 8,
    "max_steps": STEPS,
    "max_grad_norm": 0.0,
    "optim": "sgd",
    "learning_rate": 3.0,
    "freeze_vision": False,
}


def main() -> None:
    """Compare all aggregations and print the largest differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    report = {name: compare(name) for name in AGGREGATIONS}
    for name, result in report.items():
        print(
            f"{name:14} TRL's {AGGREGATIONS[name]:8} largest difference: loss {result['loss_difference']:.1e}, gradient "
            f"{result['gradient_difference']:.1e} of its norm; tokens clipped at most {result['clipped']:.1%}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def compare(aggregation: str) -> dict[str, object]:
    """Losses and gradient norms of both trainers, and their largest differences."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        ours = _ours(aggregation, Path(folder) / "ours")
        theirs = _theirs(AGGREGATIONS[aggregation], Path(folder) / "trl")
    losses = [abs(one["loss"] - two["loss"]) for one, two in zip(ours, theirs, strict=True)]
    gaps = [_gap(one["gradient"], two["gradient"]) for one, two in zip(ours, theirs, strict=True)]
    return {
        "ours": [{"loss": step["loss"], "gradient_norm": _norm(step["gradient"])} for step in ours],
        "trl": [{"loss": step["loss"], "gradient_norm": _norm(step["gradient"])} for step in theirs],
        "loss_difference": max(losses),
        "gradient_difference": max(gaps),
        "clipped": max(step["clipped"] for step in theirs),
        "clipped_ours": max(step["clipped"] for step in ours),
    }


def completions() -> dict[str, list[list[int]]]:
    """{question: token ids of its rollouts}, of many lengths; some end, some are cut."""
    tokenizer = rl_trainers.make_processor().tokenizer
    draw = random.Random(1)
    found = {}
    for row in _rows():
        found[str(row["prompt"])] = [
            [draw.randrange(100) for _ in range(draw.randint(2, NEW_TOKENS - 1))]
            + ([tokenizer.eos_token_id] if place % 2 else [])
            for place in range(ROLLOUTS)
        ]
    return found


def reward(completion_ids, **columns) -> list[float]:
    """Thousands, different for most rollouts."""
    return [1000.0 * (sum(ids) % 17) for ids in completion_ids]


def _rows() -> list[dict[str, object]]:
    return [{**row, "prompt": f"{number}: {row['prompt']}"} for number, row in enumerate(rl_trainers.rows()[:PROMPTS])]


def _ours(aggregation: str, folder: Path) -> list[dict]:
    from metis_home.training.rollouts.types import Rollout

    answers = completions()

    class FixedEngine:
        shares_weights = True

        def generate(self, prompts, num_generations, sampling):
            return [
                [
                    Rollout(
                        prompt=prompt,
                        completion_ids=ids,
                        logprobs=[-1.0] * len(ids),
                        loss_mask=[1] * len(ids),
                        finished=ids[-1] in sampling.eos_token_ids,
                    )
                    for ids in answers[_text(prompt.messages)]
                ]
                for prompt in prompts
            ]

        def update_weights(self, model) -> None:
            pass

        def seed(self, seed: int) -> None:
            pass

        def state_dict(self) -> dict:
            return {}

        def load_state_dict(self, state: dict) -> None:
            pass

    trainer = rl_trainers.our_trainer(
        rl_trainers.make_model(),
        rl_trainers.make_processor(),
        _rows(),
        [reward],
        folder,
        **SHARED,
        engine=FixedEngine(),
        prompts_per_step=PROMPTS,
        max_completion_tokens=NEW_TOKENS,
        passes_per_rollout=2,
        old_logprobs="recompute",
        loss_aggregation=aggregation,
        self_check=False,
    )
    trainer.updater.suppress_token_ids = ()
    return _recorded(trainer, lambda logs: logs.get("clip/low", 0.0) + logs.get("clip/high", 0.0))


def _theirs(loss_type: str, folder: Path) -> list[dict]:
    answers, counts = completions(), dict.fromkeys(completions(), 0)
    processor = rl_trainers.make_processor()
    processor.tokenizer.padding_side = "left"

    def rollouts(prompts, trainer) -> dict[str, list]:
        made = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        for prompt in prompts:
            question = _text(prompt)
            ids = answers[question][counts[question] % ROLLOUTS]
            counts[question] += 1
            inputs = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
            made["prompt_ids"].append(inputs["input_ids"][0])
            made["completion_ids"].append(ids)
            made["logprobs"].append([-1.0] * len(ids))
        return made

    trainer = rl_trainers.trl_trainer(
        rl_trainers.make_model(),
        processor,
        _rows(),
        [reward],
        folder,
        **SHARED,
        rollout_func=rollouts,
        gradient_accumulation_steps=PROMPTS * ROLLOUTS // 8,
        max_completion_length=NEW_TOKENS,
        num_iterations=2,
        loss_type=loss_type,
    )
    return _recorded(trainer, lambda logs: logs.get("clip_ratio/region_mean", 0.0))


def _recorded(trainer, clipped) -> list[dict]:
    """Train; per optimizer step its loss, its gradient before the step, and the share of clipped tokens."""
    import torch

    steps: list[dict] = []
    losses: list[float] = []
    training_step = trainer.training_step

    def recording_step(*args, **kwargs):
        loss = training_step(*args, **kwargs)
        losses.append(float(loss))
        return loss

    def before_step(optimizer, args, kwargs) -> None:
        gradient = {
            name: parameter.grad.detach().clone()
            for name, parameter in trainer.model.named_parameters()
            if parameter.grad is not None
        }
        steps.append({"loss": sum(losses), "gradient": gradient})
        losses.clear()

    trainer.training_step = recording_step
    create = trainer.create_optimizer

    def creating(*args, **kwargs) -> torch.optim.Optimizer:
        optimizer = create(*args, **kwargs)
        trainer.optimizer.register_step_pre_hook(before_step)
        return optimizer

    trainer.create_optimizer = creating
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, entry in zip(steps, logs, strict=True):
        step["clipped"] = clipped(entry)
    return steps


def _text(messages) -> str:
    content = messages[-1]["content"]
    return content if isinstance(content, str) else "".join(block.get("text") or "" for block in content)


def _gap(one: dict, two: dict) -> float:
    """|one - two| / |one| over all parameters; a parameter without a gradient has a gradient of 0."""
    names = set(one) | set(two)
    zero = {name: (one.get(name, two.get(name))) * 0 for name in names}
    squares = [(one.get(name, zero[name]) - two.get(name, zero[name])).square().sum() for name in names]
    return float(sum(squares)) ** 0.5 / _norm(one)


def _norm(gradient: dict) -> float:
    return float(sum(value.square().sum() for value in gradient.values())) ** 0.5


if __name__ == "__main__":
    main()
