"""What benchmarks/rl.py compares: the same model, rows and settings in `MetisRLTrainer` and in TRL's `GRPOTrainer`."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e5},
}
VISION = {"depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128}
PROMPTS, ROLLOUTS, NEW_TOKENS, IMAGE_PIXELS = 4, 8, 128, 56
ROWS = 64
Reward = Callable[..., Sequence[float | None]]


def rows() -> list[dict[str, object]]:
    """Sums, half of them with an image; every answer is worked out in one to six lines."""
    from PIL import Image

    draw = random.Random(0)
    made: list[dict[str, object]] = []
    for index in range(ROWS):
        one, two = draw.randint(1, 9), draw.randint(1, 9)
        image = Image.new("RGB", (IMAGE_PIXELS, IMAGE_PIXELS), (4 * index % 256, 90, 200))
        made.append(
            {
                "prompt": f"What is {one} + {two}?" + " Think first." * (index % 3),
                **({"image": image} if index % 2 else {}),
                "reasoning": f"{one} + {two} is {one + two}. " * draw.randint(1, 6),
                "answer": str(one + two),
                "kind": "integer",
                "mode": "thinking",
            }
        )
    return made


def make_processor():
    """Of a byte-level tokenizer and small images."""
    from transformers import Qwen2VLImageProcessorPil

    from metis_home import MetisHomeProcessor
    from tests.processing.tiny import tiny_tokenizer

    return MetisHomeProcessor(Qwen2VLImageProcessorPil(min_pixels=28 * 28), tiny_tokenizer())


def make_model():
    """A random dense Qwen2.5-VL."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from tests.processing.tiny import model_fields, tiny_tokenizer

    fields = model_fields(tiny_tokenizer())
    fields["text_config"] = {**fields["text_config"], **TEXT}
    fields["vision_config"] = {**fields["vision_config"], **VISION, "fullatt_block_indexes": [0]}
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**fields))


def teach(model, processor, *, steps: int, rows_per_step: int = 16) -> float:
    """Show it the rows' responses, so that answers have a format and different lengths; returns the last loss."""
    import torch

    from metis_home.training.data.collate import PaddingCollator
    from metis_home.training.data.encode import Encoder
    from metis_home.training.data.records import load_records

    encoder = Encoder(processor, system_prompt=None)
    examples = [encoder.example(record) for record in load_records(rows())]
    collate = PaddingCollator(processor.tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = random.Random(0)
    for _ in range(steps):
        batch = collate(draw.sample(examples, rows_per_step))
        drop = ("router_labels", "record_index")
        loss = model(**{name: value for name, value in batch.items() if name not in drop}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def write_model(folder: Path, *, steps: int = 120) -> float:
    """Save a taught model with its processor; returns its last loss."""
    processor, model = make_processor(), make_model()
    loss = teach(model, processor, steps=steps)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return loss


def load(folder: Path):
    """Processor and model of `write_model`."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from metis_home import MetisHomeProcessor

    processor = MetisHomeProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    return processor, Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)


def rewards() -> list[Reward]:
    """Accuracy and format; the overlong penalty over nearly the whole length tells the rollouts of any prompt apart."""
    from metis_home.training.rewards import accuracy_reward, format_reward, overlong_reward_for

    return [accuracy_reward, format_reward, overlong_reward_for(NEW_TOKENS, NEW_TOKENS - 1)]


def shared_settings(folder: Path) -> dict[str, object]:
    """What both configurations call the same."""
    return {
        "output_dir": str(folder),
        "num_generations": ROLLOUTS,
        "per_device_train_batch_size": ROLLOUTS,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_steps": 10_000,
        "gradient_checkpointing": False,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "log_completions": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }


def our_trainer(
    model, processor, data: list[dict[str, object]], reward_funcs: Sequence[Reward], folder: Path, **fields
):
    """`MetisRLTrainer`; without dynamic sampling, which TRL has not."""
    from metis_home.training.data.records import load_records
    from metis_home.training.rl import MetisRLConfig, MetisRLTrainer

    callbacks, engine = fields.pop("callbacks", None), fields.pop("engine", None)
    config = MetisRLConfig(
        **{
            **shared_settings(folder),
            "prompts_per_step": PROMPTS,
            "max_completion_tokens": NEW_TOKENS,
            "system_prompt": None,
            "dynamic_sampling": False,
            "plots": False,
            **fields,
        }
    )
    prompts = [{name: row[name] for name in row if name not in ("reasoning", "mode")} for row in data]
    return MetisRLTrainer(
        model, config, list(reward_funcs), load_records(prompts), processor, engine=engine, callbacks=callbacks
    )


def trl_trainer(
    model, processor, data: list[dict[str, object]], reward_funcs: Sequence[Reward], folder: Path, **fields
):
    """TRL's `GRPOTrainer` on the same rows."""
    from datasets import Dataset, Image, List
    from trl import GRPOConfig, GRPOTrainer

    callbacks, rollout_func = fields.pop("callbacks", None), fields.pop("rollout_func", None)
    freeze_vision = fields.pop("freeze_vision", True)
    settings = {
        **shared_settings(folder),
        "gradient_accumulation_steps": PROMPTS,
        "max_completion_length": NEW_TOKENS,
        "beta": 0.0,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "delta": 3.0,
        "loss_type": "dapo",
        "shuffle_dataset": True,
        **fields,
    }
    processor.tokenizer.response_template = None  # completions as they were written
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=list(reward_funcs),
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list([_conversation(row) for row in data]).cast_column("images", List(Image())),
        processing_class=processor,
        callbacks=callbacks,
        rollout_func=rollout_func,
    )
    trainer.model.register_forward_pre_hook(_without_empty_images, with_kwargs=True)
    if freeze_vision:
        for name, parameter in trainer.model.named_parameters():
            if ".visual." in f".{name}":
                parameter.requires_grad_(False)
    return trainer


def _conversation(row: dict[str, object]) -> dict[str, object]:
    image = [{"type": "image"}] if "image" in row else []
    content = [*image, {"type": "text", "text": row["prompt"]}]
    return {
        "prompt": [{"role": "user", "content": content}],
        "images": [row["image"]] if image else [],
        "solution": row["answer"],
        "kind": row.get("kind"),
    }


def _without_empty_images(model: object, arguments: tuple, fields: dict) -> tuple[tuple, dict]:
    """As in an exported train.py: TRL gives text-only rows pixels of 0 images, and the vision tower cannot read them."""
    grids = fields.get("image_grid_thw")
    if grids is not None and len(grids) == 0:
        fields = {name: value for name, value in fields.items() if name not in ("pixel_values", "image_grid_thw")}
    return arguments, fields
