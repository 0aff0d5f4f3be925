"""What Stage-SFT costs beside dense SFT, and what packing saves.

    python benchmarks/sft.py [--json FILE] [--rounds 12]

Each variant is a real trainer in a process of its own. The processes take turns, one optimizer step each, so that a noisy
machine disturbs all alike; the reported figure is the median of the rounds' ratios, and the peak memory is the process's.

    one branch   MetisSFTTrainer, all rows thinking        against transformers.Trainer on the dense model, same rows
    mixed        MetisSFTTrainer, half the rows of each    against the same
    packing      MetisSFTTrainer, rows packed              against MetisSFTTrainer, rows padded; tokens per second

Everything trains: both branches have gradients and optimizer state also where a batch uses only one of them. The length
mix of the packing case is ours: half direct answers (a few words), half thoughts whose lengths are log-normal with a
median of 250 tokens, as reasoning data has them; prompts of about 150 tokens, half of them with an image.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks import turns  # noqa: E402

TEXT = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e5},
}
VISION = {"depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 384}
ROWS, ROW_TOKENS, IMAGE_PIXELS = 4, 512, 112
PACK_ROWS, PACK_LIMIT = 8, 1600
QUESTION = "What follows from the figure? Answer with a number. " * 2  # every byte is a token
GOALS = {"one branch, time": 1.05, "mixed, time": 1.10, "packing, tokens per second": 1.5}
CASES = {
    "one branch, time": ("one_branch", "dense"),
    "mixed, time": ("mixed", "dense"),
    "packing, tokens per second": ("packed", "padded"),
}
VARIANTS = ("dense", "one_branch", "mixed", "padded", "packed")


def main() -> None:
    """Run all variants in turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "HF_HUB_OFFLINE": "1"}
    commands = {variant: [sys.executable, __file__, "--worker", variant] for variant in VARIANTS}
    report = summarise(turns.take_turns(commands, arguments.rounds, environment), arguments.rounds)
    for row in report["rows"]:
        spread = f"(p20 {row['ratio_p20']:.3f}, p80 {row['ratio_p80']:.3f})"
        processor = f"processor time {row['processor_time_ratio']:.3f}"
        print(f"{row['case']:28} {row['ratio']:.3f} {spread}, {processor}, goal {row['goal']}")
    for variant, found in report["variants"].items():
        print(f"{variant:12} {found['seconds']:.3f} s a step, peak {found['peak_bytes'] / 2**20:.0f} MiB")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def summarise(steps: dict[str, list[dict[str, float]]], rounds: int) -> dict[str, object]:
    """Ratios per round, their median and spread, in wall time and in processor time."""

    def ratios(case: str, clock: str) -> list[float]:
        variant, other = CASES[case]
        if variant != "packed":
            return [a[clock] / b[clock] for a, b in zip(steps[variant], steps[other], strict=True)]
        rate = {name: [step["tokens"] / step[clock] for step in steps[name]] for name in (variant, other)}
        return [a / b for a, b in zip(rate[variant], rate[other], strict=True)]

    def row(case: str) -> dict[str, object]:
        wall, processor = sorted(ratios(case, "seconds")), sorted(ratios(case, "cpu_seconds"))
        variant, other = CASES[case]
        return {
            "case": case,
            "ratio": statistics.median(wall),
            "ratio_p20": wall[int(0.2 * len(wall))],
            "ratio_p80": wall[min(len(wall) - 1, int(0.8 * len(wall)))],
            "processor_time_ratio": statistics.median(processor),
            "goal": GOALS[case],
            "peak_memory_ratio": steps[variant][-1]["peak_bytes"] / steps[other][-1]["peak_bytes"],
        }

    return {
        "machine": turns.machine(),
        "settings": {**TEXT, "rows": ROWS, "row_tokens": ROW_TOKENS, "image_pixels": IMAGE_PIXELS, "rounds": rounds},
        "rows": [row(case) for case in CASES],
        "variants": {
            variant: {
                "seconds": statistics.median(step["seconds"] for step in steps[variant]),
                "cpu_seconds": statistics.median(step["cpu_seconds"] for step in steps[variant]),
                "tokens_per_second": sum(step["tokens"] for step in steps[variant])
                / sum(step["seconds"] for step in steps[variant]),
                "peak_bytes": steps[variant][-1]["peak_bytes"],
            }
            for variant in VARIANTS
        },
    }


def work(variant: str) -> None:
    """One trainer; a step whenever the parent says so."""
    channel = turns.result_channel()

    import torch
    from transformers import Trainer, TrainingArguments

    from metis_home.training import MetisSFTConfig, MetisSFTTrainer
    from metis_home.training.data.collate import PaddingCollator
    from metis_home.training.data.encode import Encoder
    from metis_home.training.data.records import load_records
    from metis_home.training.sft.dataset import RecordDataset

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    processor, dense, two_branch = models()
    counts: list[int] = []

    def describe() -> dict[str, float]:
        tokens = sum(counts)
        counts.clear()
        return {"tokens": tokens}

    turn = turns.turn_callback(channel, describe)

    def without(collate, drop: tuple[str, ...]):
        return lambda examples: {name: value for name, value in collate(examples).items() if name not in drop}

    def count_tokens(trainer: Trainer) -> None:
        """Count what each step trains on; batches are collated one step ahead, so not there."""
        step = trainer.training_step

        def counted(model, inputs, *arguments):
            mask = inputs.get("attention_mask")
            counts.append(inputs["input_ids"].numel() if mask is None else int(mask.sum()))
            return step(model, inputs, *arguments)

        trainer.training_step = counted

    with tempfile.TemporaryDirectory() as folder:
        records = load_records(rows(variant))
        settings = {
            "output_dir": folder,
            "per_device_train_batch_size": PACK_ROWS if variant in ("padded", "packed") else ROWS,
            "max_steps": 10_000,
            "learning_rate": 1e-4,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
        }
        if variant == "dense":
            dataset = RecordDataset(records, Encoder(processor, system_prompt=None), cache_gib=2.0)
            trainer = Trainer(
                dense,
                TrainingArguments(**settings, remove_unused_columns=False),
                data_collator=without(
                    PaddingCollator(processor.tokenizer.pad_token_id), ("router_labels", "record_index")
                ),
                train_dataset=dataset,
                callbacks=[turn],
            )
        else:
            config = MetisSFTConfig(**settings, packing=variant == "packed", plots=False, system_prompt=None)
            trainer = MetisSFTTrainer(
                two_branch, config, train_dataset=records, processing_class=processor, callbacks=[turn]
            )
        count_tokens(trainer)
        trainer.train()


def models():
    """A processor, the dense model and the two-branch model whose branches both are it."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    from metis_home import MetisHomeConfig, MetisHomeForConditionalGeneration, MetisHomeProcessor
    from metis_home.names import dense_name_of
    from tests.processing.tiny import model_fields, tiny_tokenizer

    processor = MetisHomeProcessor(Qwen2VLImageProcessorPil(min_pixels=28 * 28), tiny_tokenizer())
    fields = model_fields(processor.tokenizer)
    fields["text_config"] = {**fields["text_config"], **TEXT}
    fields["vision_config"] = {**fields["vision_config"], **VISION, "fullatt_block_indexes": [0]}
    dense = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**fields))
    two_branch = MetisHomeForConditionalGeneration(MetisHomeConfig(**fields))
    state = dense.state_dict()
    ours = {
        name: state[source] for name in two_branch.state_dict() for source in [_source(name, dense_name_of)] if source
    }
    two_branch.load_state_dict(ours, strict=False)
    return processor, dense, two_branch


def _source(name: str, dense_name_of) -> str | None:
    return dense_name_of(name, 1) or dense_name_of(name, 0)


def rows(variant: str) -> list[dict[str, object]]:
    """Rows of one length for the time of a step; of many lengths for packing."""
    from PIL import Image

    draw = random.Random(0)
    image = Image.effect_noise((IMAGE_PIXELS, IMAGE_PIXELS), 64).convert("RGB")
    made: list[dict[str, object]] = []
    for index in range(64):
        if variant in ("padded", "packed"):
            thinking = index % 2 == 0
            length = int(min(PACK_LIMIT, draw.lognormvariate(5.5, 0.7))) if thinking else draw.randint(2, 12)
        else:
            thinking, length = variant != "mixed" or index % 2 == 0, ROW_TOKENS
        text = "".join(draw.choice("abcdefgh ") for _ in range(length))
        made.append(
            {
                "prompt": f"Question {index:04d}? " + QUESTION,
                **({"image": image} if index % 4 < 2 else {}),
                "reasoning": text if thinking else "",
                "answer": "4" if thinking or variant in ("padded", "packed") else text + "4",
                "mode": "thinking" if thinking else "non_thinking",
            }
        )
    return made


if __name__ == "__main__":
    main()
