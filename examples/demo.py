"""The main job from end to end, on real weights and without a hub: `make demo`.

Builds a dense Qwen2.5-VL with SmolLM2's language model inside, converts it into a two-branch model, loads that like any
Hugging Face model, lets the router choose, answers, and proves that each branch still computes exactly what the dense
model computes.

What it does not show: a useful choice or a useful look at an image. The router of a fresh conversion is untrained, both
branches begin as the same model, and the vision tower of this small checkpoint is random.

    python examples/demo.py [--cache DIR] [--max-new-tokens N]
"""

import argparse
import importlib.util
import logging
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from build_dense_checkpoint import build as build_dense

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

QUESTIONS = (
    "What is the capital of France? Answer in one sentence.",
    "A train travels 60 km in 40 minutes. How fast is it in km per hour? Reason step by step.",
    "Name the three primary colours.",
)
IMAGE_NUMBER = 0  # of easy-vqa's test images; its questions come with the package


def main() -> int:
    """Run the demo; 0 if every branch equals the dense model."""
    parser = argparse.ArgumentParser(description="Convert a dense model, load it, route and answer a few questions.")
    parser.add_argument("--cache", type=Path, default=Path(".cache/demo"), metavar="DIR", help="default: .cache/demo")
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="per answer (default: 48)")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    dense, two_branch = arguments.cache / "dense", arguments.cache / "two-branch"
    conversations = questions()

    with stage("1. a dense Qwen2.5-VL with SmolLM2-135M's language model", dense):
        if not (dense / "config.json").is_file():
            build_dense(dense)
    with stage("2. metis-home convert: dense -> two branches", two_branch):
        convert(dense, two_branch)
    with stage("3. AutoModelForImageTextToText and AutoProcessor load it", two_branch):
        model, processor = load(two_branch)
    with stage("4. route and answer"):
        from metis_home.chat import route

        threshold = middle(route(model, processor, messages).thinking_probability for messages in conversations)
        print(
            f"   router_threshold={threshold:.3f}: the middle of the four probabilities, so that both branches answer"
        )
        table = answers(model, processor, conversations, threshold, arguments.max_new_tokens)
    print_answers(table)
    with stage("5. each branch against the dense model, bit for bit"):
        differing = compare(model, processor, dense, conversations)
    for line in differing:
        print(f"DIFFERS: {line}")
    if differing:
        return 1
    print(
        f"\nEach branch equals the dense model bit for bit: {2 * len(conversations)} comparisons of all logits, "
        f"{len(conversations)} prompts (one with an image) x 2 branches."
    )
    print(
        "The router is new: its probabilities come from random weights and mean nothing before training.\n"
        "Both branches begin as the same model, so the choice does not change an answer yet.\n"
        "The vision tower is random: the image is processed, not understood."
    )
    return 0


@contextmanager
def stage(title: str, path: Path | None = None):
    """Announce a step, and say how long it took."""
    print(f"{title}{f'   [{path}]' if path else ''}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - start:.1f} s", flush=True)


def questions() -> list[list[dict]]:
    """The conversations of the demo: three of text, one with a real image of the easy-vqa package."""
    image, question = easy_vqa(IMAGE_NUMBER)
    blocks = [{"type": "image", "image": str(image)}, {"type": "text", "text": question}]
    return [*([{"role": "user", "content": text}] for text in QUESTIONS), [{"role": "user", "content": blocks}]]


def easy_vqa(number: int) -> tuple[Path, str]:
    """A test image of the easy-vqa package and its first question, read as data files."""
    import json

    package = importlib.util.find_spec("easy_vqa")  # finds it, does not import it
    if package is None or package.origin is None:
        raise SystemExit("error: the package easy-vqa is missing: pip install --no-deps easy-vqa")
    folder = Path(package.origin).parent / "data" / "test"
    entries = json.loads((folder / "questions.json").read_text())
    question = next(text for text, _, image in entries if image == number)
    return folder / "images" / f"{number}.png", question


def convert(dense: Path, two_branch: Path) -> None:
    """Make the two-branch model anew: it is the point of the demo, and takes a second."""
    from metis_home.convert import upcycle

    upcycle(dense, two_branch, overwrite=True)
    megabytes = {path: sum(f.stat().st_size for f in path.glob("*.safetensors")) / 1e6 for path in (dense, two_branch)}
    print(f"   {megabytes[dense]:.0f} MB -> {megabytes[two_branch]:.0f} MB")


def load(two_branch: Path):
    """Load model and processor the way users do, in float32: exact for bfloat16 weights."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging as transformers_logging

    import metis_home  # noqa: F401  (registers the model with the Auto classes)

    transformers_logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(two_branch, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(two_branch)
    print(f"   {type(model).__name__}, {type(processor).__name__}, {model.num_parameters() / 1e6:.0f} M parameters")
    return model, processor


def middle(probabilities) -> float:
    """Halfway between the two middle ones."""
    ordered = sorted(float(probability) for probability in probabilities)
    return (ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2


def answers(model, processor, conversations, threshold: float, max_new_tokens: int):
    """Answer each conversation with the branch that the router chooses at this threshold."""
    from metis_home.chat import answer

    options = {"router_threshold": threshold, "max_new_tokens": max_new_tokens, "do_sample": False}
    return [(messages, answer(model, processor, messages, thinking="auto", **options)) for messages in conversations]


def print_answers(table) -> None:
    """One row per question: branch, probability, answer."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    view = Table(box=box.SIMPLE_HEAD, show_lines=True)
    view.add_column("question", ratio=4)
    view.add_column("P(thinking)", justify="right")
    view.add_column("branch", no_wrap=True)
    view.add_column("answer", ratio=6)
    for messages, given in table:
        content = messages[0]["content"]
        question = content if isinstance(content, str) else f"[{Path(content[0]['image']).name}] {content[1]['text']}"
        view.add_row(
            plain(question),
            f"{given.thinking_probability:.3f}",
            given.branch.label,
            plain(given.content + ("" if given.finished else " ...")),
        )
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120).print(view)


def plain(text: str):
    """Text that rich prints as it is, brackets included."""
    from rich.text import Text

    return Text(text)


def compare(model, processor, dense: Path, conversations) -> list[str]:
    """Compare all logits of each branch with the dense model's; returns what differs."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from metis_home import Branch
    from metis_home.chat import prepare

    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(dense, dtype=torch.float32).eval()
    differing = []
    for number, messages in enumerate(conversations, start=1):
        _, inputs = prepare(processor, messages, None)
        with torch.no_grad():
            expected = reference(**inputs).logits
            for branch in Branch:
                found = model(**inputs, branch_ids=int(branch)).logits
                if not torch.equal(found, expected):
                    error = (found - expected).abs().max().item()
                    differing.append(f"question {number}, {branch.label} branch: logits differ by up to {error:.3g}")
    return differing


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sys.exit(main())
