"""Stage-SFT of the study: upcycle the dense model, train branches and router, answer held-out queries in all modes."""

import hashlib
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from metis_home import Branch, MetisHomeForConditionalGeneration, MetisHomeProcessor
from metis_home.convert import upcycle
from metis_home.media import Message
from metis_home.training.data.check import check_records
from metis_home.training.data.encode import Encoder
from metis_home.training.data.formats import build_response
from metis_home.training.data.records import Record, load_records
from metis_home.training.evaluation import evaluate
from metis_home.training.sft import MetisSFTConfig, MetisSFTTrainer, train_router

if TYPE_CHECKING:
    from metis_home.training.evaluation.completions import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTSettings:
    """How Stage-SFT trains, with the loss of Metis-HOME (prediction and router, 1:1); all numbers are ours."""

    steps: int = 500
    rows_per_batch: int = 32
    learning_rate: float = 1e-3
    router_steps: int = 300
    """Of a router alone, on frozen features."""
    router_learning_rate: float = 2e-3
    max_new_tokens: int = 80
    """Of an answer; the longest derivation has about 60."""


def upcycled(dense: Path, folder: Path, *, pooling: str, seed: int) -> dict[str, object]:
    """Both branches from the dense model, a random router."""
    manifest = upcycle(dense, folder, router_pooling=pooling, router_hidden_size=64, seed=seed, overwrite=True)
    return {"fingerprint": manifest.fingerprint}


def train_sft(two_branch: Path, folder: Path, records: list[Record], settings: SFTSettings, *, seed: int) -> dict:
    """Train all parameters on `records` and write the model to `folder`; the training curves come back."""
    model = MetisHomeForConditionalGeneration.from_pretrained(two_branch)
    processor = MetisHomeProcessor.from_pretrained(two_branch)
    arguments = MetisSFTConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.rows_per_batch,
        learning_rate=settings.learning_rate,
        warmup_steps=0.05,
        **_quiet(settings.steps, seed),
    )
    trainer = MetisSFTTrainer(model=model, args=arguments, train_dataset=records, processing_class=processor)
    trainer.train()
    trainer.save_model(str(folder))
    curves = ("lm_loss_thinking", "lm_loss_non_thinking", "router_loss", "router_accuracy")
    history = [entry for entry in trainer.state.log_history if "router_accuracy" in entry]
    return {name: [entry.get(name) for entry in history] for name in ("step", *curves)}


def train_router_alone(
    two_branch: Path, folder: Path, train: list[Record], test: list[Record], settings: SFTSettings, *, seed: int
) -> dict[str, float]:
    """Train the router of a copy in `folder` on frozen features; return what it does on held-out queries."""
    shutil.copytree(two_branch, folder)
    config = MetisSFTConfig(
        output_dir=str(folder / "logs"),
        max_steps=settings.router_steps,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        learning_rate=settings.router_learning_rate,
        **_quiet(settings.router_steps, seed),
    )
    metrics = train_router(folder, train, config, eval_records=test).eval_metrics
    return {name: metrics[f"eval_{name}"] for name in ("router_accuracy", "router_auc", "router_ece", "router_loss")}


def answers(
    model: Path, folder: Path, records: list[Record], modes: Sequence[str], max_new_tokens: int
) -> list["Completion"]:
    """Answer `records` greedily in each mode; a two-branch or a dense directory."""
    from transformers import AutoModelForImageTextToText

    report = evaluate(
        AutoModelForImageTextToText.from_pretrained(model).eval(),
        MetisHomeProcessor.from_pretrained(model),
        records,
        thinking=list(modes),
        out_dir=folder,
        system_prompt=None,
        max_new_tokens=max_new_tokens,
        batch_tokens=20000,
        plots=False,
        overwrite=True,
    )
    return report.completions


def shuffled(records: list[Record], seed: int) -> list[Record]:
    """The control: the modes are dealt out anew, and every row is written in the format of the mode it got.

    Thought and router labels then have nothing to do with the query. All records need their reasoning.
    """
    modes = [record.mode for record in records]
    random.Random(f"control/{seed}").shuffle(modes)
    return [in_mode(record, Branch(int(mode or 0))) for record, mode in zip(records, modes, strict=True)]


def in_mode(record: Record, mode: Branch) -> Record:
    """`record` as a row of `mode`; its reasoning stands in the column `derivation`."""
    response = build_response(str(record.columns["derivation"]), str(record.answer), mode)
    return replace(record, mode=mode, response=response)


def without_images(records: list[Record]) -> list[Record]:
    """The words alone: what a text-only router sees."""

    def text_of(message: Message) -> Message:
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        return {**message, "content": [block for block in blocks if block.get("type") == "text"]}

    return [replace(record, messages=[text_of(message) for message in record.messages]) for record in records]


def words_alone(train: list[Record], test: list[Record]) -> float:
    """Accuracy of TF-IDF (words and pairs) with logistic regression on the questions' texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10.0, max_iter=1000))
    classifier.fit([question(record) for record in train], [int(record.mode or 0) for record in train])
    return float(classifier.score([question(record) for record in test], [int(record.mode or 0) for record in test]))


def question(record: Record) -> str:
    """The text of the last turn."""
    content = record.messages[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(str(block["text"]) for block in content if block.get("type") == "text")


def check(data: Path, model: Path, part: str) -> None:
    """Raise unless every row of a part can be trained on; the trainings then need not look again."""
    encoder = Encoder(MetisHomeProcessor.from_pretrained(model), system_prompt=None)
    check_records(read(data, part), purpose="sft", encoder=encoder).raise_if_bad()


def image_hashes(data: Path, part: str) -> set[str]:
    """Digests of the pixels of a part's images."""
    digests = set()
    for path in (data / "images" / part).iterdir():
        with Image.open(path) as image:
            digests.add(hashlib.sha256(image.convert("RGB").tobytes()).hexdigest())
    return digests


def read(data: Path, part: str) -> list[Record]:
    """The rows of a part of the families."""
    return load_records(data / f"{part}.jsonl")


def _quiet(steps: int, seed: int) -> dict:
    return {
        "lr_scheduler_type": "cosine",
        "logging_steps": max(1, steps // 25),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "system_prompt": None,
        "check_data": False,  # `check` did
        "seed": seed,
        "use_cpu": True,
        "plots": False,
        "dataloader_pin_memory": False,
    }
