"""A model and a five-question benchmark in the form of each kit. Run by the main environment; the kits only read files."""

import base64
import csv
import io
import json
from pathlib import Path

from PIL import Image

QUESTIONS = [
    ("What colour is it?", "red", "colour"),
    ("Is it green?", "yes", "colour"),
    ("How many corners?", "4", "shape"),
    ("What shape is it?", "square", "shape"),
    ("Is it blue?", "yes", "colour"),
]
COLOURS = ("red", "green", "yellow", "black", "blue")
TASK = "metis_home_small"

_YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function {task}_functions.visual
doc_to_text: !function {task}_functions.text
doc_to_messages: !function {task}_functions.messages
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
_FUNCTIONS = """\
from PIL import Image


def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def messages(doc, lmms_eval_specific_kwargs=None):
    blocks = [{"type": "image", "url": visual(doc)[0]}, {"type": "text", "text": text(doc)}]
    return [{"role": "user", "content": blocks}]
"""


def pictures(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for colour in COLOURS:
        path = folder / f"{colour}.png"
        Image.new("RGB", (56, 56), colour).save(path)
        paths.append(path)
    return paths


def write_lmms_task(folder: Path) -> Path:
    """Write the task's YAML, functions and rows; returns the folder for --include_path."""
    rows = folder / "rows.json"
    images = pictures(folder / "images")
    rows.write_text(
        json.dumps(
            [
                {"question": question, "answer": answer, "category": category, "image": str(image)}
                for (question, answer, category), image in zip(QUESTIONS, images, strict=True)
            ]
        )
    )
    include = folder / "tasks"
    include.mkdir()
    (include / f"{TASK}.yaml").write_text(_YAML.format(task=TASK, data=rows))
    (include / f"{TASK}_functions.py").write_text(_FUNCTIONS)
    return include


def write_vlmeval_rows(folder: Path) -> Path:
    """Write the TSV file of a VLMEvalKit data set; images inside, as base64."""
    path = folder / f"{TASK}.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "image", "question", "answer", "category"])
        for number, ((question, answer, category), image) in enumerate(
            zip(QUESTIONS, pictures(folder / "images"), strict=True)
        ):
            buffer = io.BytesIO()
            Image.open(image).save(buffer, "PNG")
            writer.writerow([number, base64.b64encode(buffer.getvalue()).decode(), question, answer, category])
    return path
