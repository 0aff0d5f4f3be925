"""A tiny two-branch model with its processor, and rows of both branches with and without images."""

import random
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from metis_home import MetisHomeConfig, MetisHomeForConditionalGeneration, MetisHomeProcessor
from metis_home.training.data.collate import PaddingCollator
from metis_home.training.data.encode import Encoder
from metis_home.training.data.records import Record, load_records
from metis_home.training.sft import MetisSFTConfig, MetisSFTTrainer
from tests.processing.tiny import model_fields, tiny_tokenizer


@cache
def processor() -> MetisHomeProcessor:
    return MetisHomeProcessor(Qwen2VLImageProcessorPil(), tiny_tokenizer())


def small_model(seed: int = 0, **fields) -> MetisHomeForConditionalGeneration:
    """Random weights large enough that a wrong path shows."""
    torch.manual_seed(seed)
    fields = {**model_fields(processor().tokenizer), "router_trained": False, "router_hidden_size": 16, **fields}
    model = MetisHomeForConditionalGeneration(MetisHomeConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "router" not in name:
                parameter.mul_(4)
    return model


def small_image(seed: int, size: int = 56) -> Image.Image:
    color = tuple(random.Random(seed).choices(range(256), k=3))
    return Image.new("RGB", (size, size), color)


def rows(count: int = 8, *, images: bool = True, unlabelled: tuple[int, ...] = ()) -> list[dict]:
    """`count` rows of very uneven length: odd ones think, every third has an image."""
    made = []
    for number in range(count):
        row = {"prompt": f"What is {number} + {number}?", "answer": "x" * (1 + 3 * number % 7), "id": f"row-{number}"}
        if number % 2:
            row |= {"reasoning": "because " * (1 + number % 4), "mode": "thinking", "source": "sums"}
        else:
            row |= {"mode": "non_thinking", "source": "words"}
        if number in unlabelled:
            row["response"] = f"<think></think><answer>{row.pop('answer')}</answer>"
            del row["mode"]
            row.pop("reasoning", None)
        if images and number % 3 == 0:
            row["image"] = small_image(number)
        made.append(row)
    return made


def records(count: int = 8, **options) -> list[Record]:
    return load_records(rows(count, **options))


def batch_of(written: list[dict], collator=None) -> dict:
    """Rows as a batch of the model: padded, or as `collator` makes it."""
    encoder = Encoder(processor(), system_prompt=None)
    collate = collator or PaddingCollator(0)
    return collate([encoder.example(record) for record in load_records(written)])


def config(out: Path, **settings) -> MetisSFTConfig:
    """Short, quiet and on the CPU."""
    defaults = {
        "output_dir": str(out),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "disable_tqdm": True,
        "plots": False,
        "system_prompt": None,
    }
    return MetisSFTConfig(**{**defaults, **settings})


def trainer(out: Path, train: list[Record], model=None, **settings) -> MetisSFTTrainer:
    return MetisSFTTrainer(
        model=small_model() if model is None else model,
        args=config(out, **settings),
        train_dataset=train,
        processing_class=processor(),
    )
