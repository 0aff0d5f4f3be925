"""Stage-RL in each process of the distributed tests.

`scripted` trains on rollouts that follow from the prompt alone, so one process and two see the same ones; rank 0's
prompts have images and are answered by the thinking branch, rank 1's have none and are answered by the other.
`scripted_branch` does so where nothing before the first layer's FFN trains.
`scripted_updates`: two optimizer steps share the rollouts, whose lengths make rank 1 fill its second step up with
rollouts of its first. `scripted_exhausted`: only one prompt teaches anything, so one rank has nothing.
`sampled` generates with the model itself, with lengths, refills and rounds that differ among ranks, and answers three
held-out prompts after each step.
"""

import random
from pathlib import Path

import torch

from metis_home.training.data.encode import Encoder
from metis_home.training.data.records import Record, load_records
from metis_home.training.rl import MetisRLConfig, MetisRLTrainer
from metis_home.training.rl.prompts import PromptSource
from metis_home.training.rollouts.types import Rollout
from tests.training.distributed import engines
from tests.training.distributed.worker import full_weights, keep_gradients
from tests.training.sft.small import processor, small_image

PROMPTS, GENERATIONS, SEED = 4, 4, 7


class Scripted:
    """Rollouts from a table: of the prompt's name, not of who asks.

    Args:
        lengths: of all answers to the prompt at that place of the order; None: each by itself.
    """

    shares_weights = True

    def __init__(self, order: list[str], lengths: list[int] | None = None, *, only_first_differs: bool = False) -> None:
        self.order, self.lengths, self.only_first_differs = order, lengths, only_first_differs

    def generate(self, prompts, num_generations, sampling):
        return [[self._rollout(prompt, number) for number in range(num_generations)] for prompt in prompts]

    def _rollout(self, prompt, number: int) -> Rollout:
        generator = random.Random(f"{prompt.id}/{number}")
        place = self.order.index(prompt.id)
        count = generator.randrange(2, 9) if self.lengths is None else self.lengths[place % len(self.lengths)]
        ids = [generator.randrange(60, 120) for _ in range(count)]
        right = sum(ids) % 2 if self.lengths is None else number % 2
        if self.only_first_differs and place:
            right = 1
        branch = int(prompt.pixel_values is not None)
        return Rollout(
            prompt=prompt,
            completion_ids=ids,
            logprobs=[-1.0] * len(ids),
            loss_mask=[1] * len(ids),
            branch=branch,
            branch_logprob=-0.7,
            text=f"{right}",
        )

    def update_weights(self, model) -> None: ...

    def seed(self, seed: int) -> None: ...

    def state_dict(self):
        return {}

    def load_state_dict(self, state) -> None: ...


def parity(prompts, completions, **columns) -> list[float]:
    return [float(turn[0]["content"] == "1") for turn in completions]


def many_letters(prompts, completions, **columns) -> list[float]:
    return [sum(char.islower() for char in turn[0]["content"]) / 8 for turn in completions]


def records() -> list[Record]:
    """Images on exactly the rows that rank 0 of two gets in the first step."""
    plain = load_records([{"prompt": "Say" + "!" * number, "answer": "1", "id": f"q{number}"} for number in range(8)])
    order = PromptSource(plain, Encoder(processor(), system_prompt=None), seed=SEED, rank=0, world_size=2)
    of_rank_0 = {prompt.index for prompt in order.take(4)}
    rows = []
    for number, record in enumerate(plain):
        row = {"prompt": "Say" + "!" * number, "answer": "1", "id": record.id}
        rows.append(row | ({"image": small_image(number)} if number in of_rank_0 else {}))
    return load_records(rows)


def _scripted(what: str, rows: list[Record]) -> Scripted | None:
    order = [prompt.id for prompt in PromptSource(rows, Encoder(processor(), system_prompt=None), seed=SEED).take(8)]
    table = {
        "scripted": Scripted(order),
        "scripted_branch": Scripted(order),
        # rank 1 has the places 1, 3, 5, 7: short ones in its first step, and in its second too few for all forwards
        "scripted_updates": Scripted(order, [10, 4, 10, 4, 100, 10, 100, 10]),
        "scripted_exhausted": Scripted(order, [6], only_first_differs=True),
    }
    return table.get(what)


def train(what: str, engine: str, model_dir: str, out: Path, world: int) -> dict:
    from metis_home import MetisHomeForConditionalGeneration

    if world > 1:
        engines.prepare_state(engine)
    is_scripted = what.startswith("scripted")
    trained = {"train_only": ["thinking_branch", "router"]} if what == "scripted_branch" else {"freeze": ["norms"]}
    shares = what == "scripted_updates" or not is_scripted
    args = MetisRLConfig(
        **{
            "output_dir": str(out),
            "use_cpu": True,
            "num_generations": GENERATIONS,
            "prompts_per_step": PROMPTS,
            "per_device_train_batch_size": 4 if what == "scripted_updates" else 3,
            "micro_batch_tokens": 400,
            "max_completion_tokens": 128 if what == "scripted_updates" else 8,
            "max_steps": 2,
            "updates_per_rollout": 2 if shares else 1,
            "old_logprobs": "recompute" if is_scripted else "auto",
            "thinking": "sample",
            **trained,
            "router_coef": 1.0,
            "dynamic_sampling": what in ("sampled", "scripted_exhausted"),
            "max_sampling_rounds": 1 if is_scripted else 3,
            "self_check": not is_scripted,
            **({} if is_scripted else {"eval_strategy": "steps", "eval_steps": 1, "eval_num_generations": 2}),
            # Adam would divide gradients that are nothing but rounding by themselves.
            "optim": "sgd" if is_scripted else "adamw_torch",
            "learning_rate": 0.1 if is_scripted else 1e-3,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0,
            "system_prompt": None,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "plots": False,
            "log_completions": False,
            "disable_tqdm": True,
            "seed": SEED,
            "watchdog_seconds": 60,
            **(engines.settings(engine) if world > 1 else {}),
        }
    )
    model = MetisHomeForConditionalGeneration.from_pretrained(model_dir)
    reward = parity if is_scripted else many_letters
    rows = records()
    held_out = None if is_scripted else rows[:3]
    trainer = MetisRLTrainer(
        model, args, [reward], rows, processor(), engine=_scripted(what, rows), eval_dataset=held_out
    )
    gradients: dict[str, torch.Tensor] = {}
    keep_gradients(trainer, engine if world > 1 else "none", gradients)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    return {
        "losses": [entry["loss"] for entry in logs],
        "logs": logs,
        "held_out": [entry for entry in trainer.state.log_history if "eval_reward" in entry],
        "gradients": gradients,
        "weights": full_weights(trainer),
        "identity": engines.identity(trainer),
    }
