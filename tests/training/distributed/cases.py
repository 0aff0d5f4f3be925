"""Rows for two ranks: with two rows a micro-batch, rank 0 gets rows 0, 1, 4, 5, ... and rank 1 the others."""

from dataclasses import dataclass, field

from metis_home.training.data.records import Record, load_records
from tests.training.sft.small import small_image


@dataclass(frozen=True)
class Case:
    """One short training run, to be done by one process and by two."""

    kinds: str
    """A letter per row: T and N have a text, I and J also an image; T and I think."""
    settings: dict = field(default_factory=dict)
    hidden: tuple[int, ...] = ()
    """Rows whose targets are hidden: their micro-batch has no supervised tokens."""
    steps: int = 1


def rows(kinds: str, hidden: tuple[int, ...] = ()) -> list[dict]:
    """Rows of very different lengths, one per letter."""
    made = []
    for number, kind in enumerate(kinds):
        row = {"prompt": f"What is {number} + {number}?", "answer": "x" * (1 + 3 * number % 7), "id": f"row-{number}"}
        if kind in "TI":
            row |= {"reasoning": "because " * (1 + number % 4), "mode": "thinking", "source": "sums"}
        else:
            row |= {"mode": "non_thinking", "source": "words"}
        if kind in "IJ":
            row["image"] = small_image(number)
        if number in hidden:
            row["response"] = f"<think></think><answer>{row.pop('answer')}</answer>"
            row.pop("mode")
            row.pop("reasoning", None)
        made.append(row)
    return made


def records(case: Case) -> list[Record]:
    return load_records(rows(case.kinds, case.hidden))


CASES = {
    # Rank 0 has only thinking rows with images, rank 1 only non-thinking rows without.
    "apart": Case("IINNIINN"),
    "swapped": Case("NNIINNII"),
    # Clipped, and without momentum, so that the clipping shows in the weights.
    "mixed": Case("ITNJNTJN", {"max_grad_norm": 0.5, "optim": "sgd", "learning_rate": 0.1}),
    # Rank 1's second micro-batch has nothing to learn from.
    "empty": Case("IINNIINN", hidden=(6, 7)),
    "packed": Case("IINNIINN", {"packing": True, "gradient_checkpointing": True}),
    # No image anywhere: the tower still takes part.
    "text_only": Case("TNNTNTTN"),
    "frozen": Case("IINNIINN", {"freeze": ["vision", "non_thinking_branch"]}),
    # Nothing before the first layer's FFN trains.
    "one_branch": Case("IINNIINN", {"train_only": ["thinking_branch", "router"]}),
    "router_and_head": Case("IINNIINN", {"train_only": ["router", "lm_head"]}),
    # Only measured: weights in bfloat16 under DeepSpeed, float32 with bfloat16 compute under FSDP2.
    "bf16": Case("IINNIINN", {"bf16": True, "use_cpu": True, "freeze": ["vision"]}),
    "router_only": Case("IINNIINN", {"train_only": ["router"]}),
}

_BASIC = ["apart", "mixed", "empty", "packed", "frozen"]
_MORE = [*_BASIC, "swapped", "text_only", "one_branch", "router_and_head"]
# Compared with one process; the router alone runs no decoder, and refuses engines that shard one.
COMPARED = [*_MORE, "router_only"]
# What an engine's two processes do: "cycle" saves, resumes and evaluates; the last are Stage-RL (`rl_worker.py`).
CASES_OF = {
    "ddp": [*_MORE, "router_only", "cycle", "scripted", "scripted_updates", "scripted_exhausted", "sampled"],
    "fsdp2": [*_MORE, "bf16", "cycle", "scripted", "scripted_branch", "sampled"],
    "zero2": [*_BASIC, "bf16", "cycle", "scripted", "sampled"],
    "zero3": [*_MORE, "bf16", "cycle", "scripted", "scripted_branch", "scripted_updates", "sampled"],
}
