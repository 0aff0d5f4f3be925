"""Rows, a tiny model and hand-made completions for the tests of evaluation."""

from pathlib import Path

from PIL import Image, ImageDraw

from metis_home.training.data.records import Record, load_records
from metis_home.training.evaluation.completions import Completion, Mode

SHORT = {"max_new_tokens": 6, "system_prompt": "", "batch_tokens": 600, "plots": False}


def pictures(folder: Path) -> list[Path]:
    """Three PNG files of different sizes, with something drawn on them."""
    folder.mkdir(exist_ok=True)
    paths = []
    for number, (colour, size) in enumerate((("red", (56, 56)), ("green", (84, 56)), ("blue", (56, 112)))):
        image = Image.new("RGB", size, colour)
        ImageDraw.Draw(image).ellipse((8, 8, 24 + 8 * number, 30), fill="white")
        paths.append(folder / f"{colour}.png")
        image.save(paths[-1])
    return paths


def rows(folder: Path, count: int = 6) -> list[dict]:
    """Questions of two sources, with and without images, of different lengths."""
    images = pictures(folder / "pictures")
    made = []
    for number in range(count):
        row: dict[str, object] = {
            "id": f"q{number}",
            "prompt": f"Question {number}? " + "and more " * (number * 5 % 4),
            "answer": str(number),
            "source": ("reading", "charts")[number % 2],
            "mode": ("non_thinking", "thinking")[number % 2],
        }
        if number % 3:
            row["image"] = str(images[number % 3])
        made.append(row)
    return made


def records(folder: Path, count: int = 6) -> list[Record]:
    return load_records(rows(folder, count))


def completion(id: str, thinking: Mode = "on", **changes) -> Completion:
    """A finished, correct answer of ten tokens in one second; `changes` replace its fields."""
    fields = {
        "index": 0,
        "source": "reading",
        "row": "r",
        "prompt": "How many?",
        "images": [],
        "gold": "4",
        "kind": None,
        "label": None,
        "branch": "thinking" if thinking == "on" else "non-thinking",
        "thinking_probability": 0.5,
        "prefix": "",
        "completion": "<think>a</think><answer>4</answer>",
        "reasoning": "a",
        "content": "4",
        "extracted": "4",
        "correct": True,
        "method": "number",
        "reason": "",
        "prompt_tokens": 20,
        "prefix_tokens": 0,
        "completion_tokens": 10,
        "finished": True,
        "seconds": 1.0,
        "router_seconds": 0.0,
    }
    return Completion(**{"id": id, "thinking": thinking, **fields, **changes})
