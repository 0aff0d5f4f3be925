"""Tiny models with a byte tokenizer, questions with and without images, and rewards that a policy can learn."""

import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from metis_home import MetisHomeConfig, MetisHomeForConditionalGeneration, MetisHomeProcessor
from metis_home.training.data.records import Record, load_records
from metis_home.training.rl import MetisRLConfig, MetisRLTrainer
from tests.processing.tiny import model_fields, tiny_tokenizer


def processor() -> MetisHomeProcessor:
    return MetisHomeProcessor(Qwen2VLImageProcessorPil(), tiny_tokenizer())


def dense(seed: int = 0, scale: float = 2.0) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(seed)
    return _louder(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**model_fields(tiny_tokenizer()))), scale)


def two_branch(seed: int = 0, scale: float = 2.0) -> MetisHomeForConditionalGeneration:
    torch.manual_seed(seed)
    config = MetisHomeConfig(**model_fields(tiny_tokenizer()), router_trained=True)
    return _louder(MetisHomeForConditionalGeneration(config), scale)


def _louder(model, scale: float):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (56, 56), (40 * number % 256, 90, 255 - 30 * number % 256))


def records(count: int = 6) -> list[Record]:
    """Every other question has an image; lengths differ."""
    rows = []
    for number in range(count):
        row = {"prompt": "What" + "?" * (number % 4), "answer": str(number), "id": f"q{number}"}
        if number % 2:
            row["image"] = picture(number)
        rows.append(row)
    return load_records(rows)


def vowels(completions, **columns) -> list[float]:
    """How many of the first five characters are lower-case: differs among rollouts, and can be learnt."""
    return [sum(char.islower() for char in turn[0]["content"][:5]) / 5 for turn in completions]


def length_reward(completion_ids, **columns) -> list[float]:
    return [float(len(ids) % 2) for ids in completion_ids]


def config(folder, **fields) -> MetisRLConfig:
    defaults = {
        "num_generations": 4,
        "prompts_per_step": 2,
        "max_completion_tokens": 6,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "system_prompt": None,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "plots": False,
        "log_completions": False,
        "disable_tqdm": True,
        "seed": 7,
    }
    return MetisRLConfig(output_dir=str(folder), **{**defaults, **fields})


def trainer(folder, model=None, rewards=(vowels,), data=None, engine=None, **fields) -> MetisRLTrainer:
    return MetisRLTrainer(
        dense() if model is None else model,
        config(folder, **fields),
        list(rewards),
        records() if data is None else data,
        processor(),
        engine=engine,
    )
