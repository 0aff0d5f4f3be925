"""The dense models of the studies, taught with the families' derivations: they think about everything.

The one of `make study` stands in for the RL-trained reasoner from which Metis-HOME begins. Stage-RL begins with one that
was taught further on derivations of mixed quality (`hasty.py`).
"""

import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from metis_home import MetisHomeProcessor
from metis_home.training.data.collate import PaddingCollator
from metis_home.training.data.encode import Encoder, Example
from metis_home.training.data.records import Record, load_records

from .model import IMAGE_SETTINGS, make_model, make_tokenizer, save
from .vision import pretrain_tower

logger = logging.getLogger(__name__)
_PROCESSOR_NAMES = ("image_processor_type", "processor_class")


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSettings:
    """How long and how fast the dense model learns."""

    steps: int = 1000
    rows_per_batch: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerSettings:
    """The same for the vision tower, which learns before the rest."""

    pictures: int = 4000
    steps: int = 500


def write_tower(folder: Path, rows: Path, settings: TowerSettings, *, seed: int = 0) -> float:
    """Write a dense directory with the tokenizer of `rows`, a pretrained vision tower and random numbers elsewhere.

    Returns:
        The share of cells of held-out images that the tower's features name rightly.
    """
    records = load_records(rows)
    texts = [f"{_question(record)} {record.response}" for record in records]
    tokenizer = make_tokenizer([*texts, "user\n", "assistant\n", "system\n"])
    model = make_model(tokenizer, seed=seed)
    plain = {name: value for name, value in IMAGE_SETTINGS.items() if name not in _PROCESSOR_NAMES}
    right = pretrain_tower(
        model, Qwen2VLImageProcessorPil(**plain), pictures=settings.pictures, steps=settings.steps, seed=seed
    )
    save(folder, model, tokenizer)
    return right


def write_encoded(file: Path, tower: Path, rows: Path) -> int:
    """Encode `rows` for `train_dense`, once for all seeds; return how many there are."""
    encoder = Encoder(MetisHomeProcessor.from_pretrained(tower), system_prompt=None)
    examples = [encoder.example(record) for record in load_records(rows)]
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(examples, file)
    return len(examples)


def train_dense(
    folder: Path, start: Path, encoded: Path, settings: DenseSettings, *, seed: int, tower_only: bool = True
) -> dict[str, float | None]:
    """Train a dense model and write it to `folder`.

    Args:
        start: what `write_tower` made, whose vision tower and tokenizer are taken, all else begins at random from
            `seed`; without `tower_only` a dense model, which is taught further.
        encoded: what `write_encoded` made.
    Returns:
        The last losses (nats per token), and how long it took.
    """
    started = time.perf_counter()
    processor = MetisHomeProcessor.from_pretrained(start)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(start)
    if tower_only:
        taught, model = model, make_model(processor.tokenizer, seed=seed)
        model.model.visual.load_state_dict(taught.model.visual.state_dict())
    examples: list[Example] = torch.load(encoded, weights_only=False)
    collate = PaddingCollator(processor.tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / settings.warmup_steps, (settings.steps - step) / max(1.0, 0.7 * settings.steps), 1.0
        ),
    )
    model.train()
    losses: list[float] = []
    for rows_of_batch in islice(_batches(len(examples), settings.rows_per_batch, seed), settings.steps):
        batch = collate([examples[row] for row in rows_of_batch])
        inputs = {name: value for name, value in batch.items() if name not in ("router_labels", "record_index")}
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % 100 == 0:
            logger.info("dense %d: step %d/%d, loss %.3f", seed, len(losses), settings.steps, _mean(losses[-100:]))
    save(folder, model.eval(), processor.tokenizer)
    return {"loss": _mean(losses[-50:]) if losses else None, "seconds": time.perf_counter() - started}


def _batches(rows: int, size: int, seed: int) -> Iterator[list[int]]:
    """Batches of row numbers without end, in a new order every epoch."""
    rng = random.Random(f"dense/{seed}")
    while True:
        order = rng.sample(range(rows), rows)
        yield from (order[begin : begin + size] for begin in range(0, rows, size))


def _mean(values: list[float]) -> float:
    """The average."""
    return sum(values) / len(values)


def _question(record: Record) -> str:
    content = record.messages[-1]["content"]
    return content if isinstance(content, str) else " ".join(block.get("text", "") for block in content)
