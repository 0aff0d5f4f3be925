"""What the second branch costs: the two-branch model against the dense model it came from.

    python benchmarks/overhead.py [--json FILE]

Interleaved in one process, so that a noisy machine disturbs both alike: every round times dense and two-branch runs of
the same work next to each other, in alternating order; the reported figure is the median of the rounds' ratios.

    prefill, one branch    forward of B equal prompts, all rows on one branch       against the dense forward
    decode, one branch     greedy tokens with a cache                               against dense decoding
    prefill, mixed         two rows, one per branch                                 against two dense forwards of one row
    decode, mixed          two rows, one per branch                                 against two dense decodings of one row
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from metis_home import Branch, MetisHomeConfig, MetisHomeForConditionalGeneration
from metis_home.names import dense_name_of

# Wide enough that matrix products, not Python, take the time; the shape of SmolLM2-135M with fewer layers.
TEXT = {
    "vocab_size": 8192,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e5},
}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 576}
TOKENS = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
GOALS = {
    "prefill, one branch": 1.02,
    "decode, one branch": 1.02,
    "prefill, mixed": 1.05,
    "decode, mixed": None,  # no goal set; reported
}


def build() -> tuple[MetisHomeForConditionalGeneration, list[Qwen2_5_VLForConditionalGeneration]]:
    """The two-branch model and its dense twins, random, float32."""
    torch.manual_seed(0)
    model = MetisHomeForConditionalGeneration(
        MetisHomeConfig(text_config=dict(TEXT), vision_config=dict(VISION), router_trained=True, **TOKENS)
    ).eval()
    twins = []
    for branch in Branch:
        twin = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=dict(TEXT), vision_config=dict(VISION), **TOKENS)
        ).eval()
        names = {name: dense_name_of(name, branch) for name in model.state_dict()}
        state = {names[name]: tensor for name, tensor in model.state_dict().items() if names[name] is not None}
        # The same tensors, not copies: where weights lie in memory would else be timed too, and decoding only reads them.
        twin.load_state_dict(state, assign=True)
        twins.append(twin)
    return model, twins


def cases(prompt_tokens: int, new_tokens: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Return {name: (dense, two-branch)}: callables that do the same work."""
    model, twins = build()
    dense = twins[Branch.THINKING]
    prompts = torch.randint(10, TEXT["vocab_size"], (2, prompt_tokens))
    mix = torch.tensor([int(Branch.NON_THINKING), int(Branch.THINKING)])
    forward = {"use_cache": False, "logits_to_keep": 1}
    decode = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    short = prompts[:, :8]
    return {
        "prefill, one branch": (
            lambda: dense(input_ids=prompts, **forward),
            lambda: model(input_ids=prompts, branch_ids=int(Branch.THINKING), **forward),
        ),
        "decode, one branch": (
            lambda: dense.generate(input_ids=short, **decode),
            lambda: model.generate(input_ids=short, thinking=True, **decode),
        ),
        "prefill, mixed": (
            lambda: [twin(input_ids=prompts[row : row + 1], **forward) for row, twin in enumerate(twins)],
            lambda: model(input_ids=prompts, branch_ids=mix, **forward),
        ),
        "decode, mixed": (
            lambda: [twin.generate(input_ids=short[row : row + 1], **decode) for row, twin in enumerate(twins)],
            lambda: model.generate(input_ids=short, branch_ids=mix, **decode),
        ),
    }


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(rounds: int, prompt_tokens: int, new_tokens: int) -> list[dict]:
    """One row per case: median seconds of both, median of the paired ratios, and their p20 and p80."""
    rows = []
    for name, (dense, ours) in cases(prompt_tokens, new_tokens).items():
        dense(), ours()
        pairs = []
        for number in range(rounds):
            order = (dense, ours) if number % 2 == 0 else (ours, dense)
            times = {work: seconds(work) for work in order}
            pairs.append((times[dense], times[ours]))
        ratios = sorted(b / a for a, b in pairs)
        rows.append(
            {
                "case": name,
                "dense_seconds": statistics.median(a for a, _ in pairs),
                "two_branch_seconds": statistics.median(b for _, b in pairs),
                "ratio": statistics.median(ratios),
                "ratio_p20": ratios[len(ratios) // 5],
                "ratio_p80": ratios[-1 - len(ratios) // 5],
                "goal": GOALS[name],
            }
        )
        print(f"  {name}: {rows[-1]['ratio']:.3f}", file=sys.stderr, flush=True)
    return rows


def machine() -> dict:
    """Where the numbers come from."""
    return {
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> int:
    """Print a table and, with --json, write the rows; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description="Time the two-branch model against its dense twins.")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()

    rows = measure(arguments.rounds, arguments.prompt_tokens, arguments.new_tokens)

    print(f"{'case':<22}{'dense s':>10}{'ours s':>10}{'ratio':>8}{'p20-p80':>16}{'goal':>8}")
    for row in rows:
        spread = f"{row['ratio_p20']:.3f}-{row['ratio_p80']:.3f}"
        goal = "" if row["goal"] is None else f"{row['goal']:.2f}"
        print(
            f"{row['case']:<22}{row['dense_seconds']:>10.4f}{row['two_branch_seconds']:>10.4f}"
            f"{row['ratio']:>8.3f}{spread:>16}{goal:>8}"
        )
    if arguments.json:
        result = {"machine": machine(), "settings": {**TEXT, "rounds": arguments.rounds}, "rows": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    missed = [row["case"] for row in rows if row["goal"] is not None and row["ratio"] > row["goal"]]
    if missed:
        print(f"goal missed: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
