"""VLMEvalKit runs our models: `register("Metis-HOME-7B", "home-7b")`, then its own `run.main()`.

VLMEvalKit has no entry points, so a script of three lines registers the model and hands over:

    from metis_home.training.evaluation.vlmeval import register, run
    register("Metis-HOME-7B", "home-7b", router_log="router.jsonl")
    run()                                   # reads --data, --model Metis-HOME-7B, --judge ... from the command line

With SPLIT_THINK=True its result file has a `thinking` column, which `metis-home think-ratio` reads.
Written for VLMEvalKit (ms-vlmeval) 0.0.20; its source is the reference for the names.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from metis_home.errors import UnsupportedError

from .kit import KitModel, split_thinking

if TYPE_CHECKING:
    from metis_home.media import Message


def is_vlmeval_available() -> bool:
    """Is VLMEvalKit installed?"""
    return importlib.util.find_spec("vlmeval") is not None


if is_vlmeval_available():
    from vlmeval.vlm.base import BaseModel as _Base
else:
    _Base = object


class MetisHomeVLMEval(_Base):
    """A two-branch or dense model as a VLMEvalKit model. Greedy; images only; the options are those of `KitModel`."""

    INTERLEAVE = True
    INSTALL_REQ = False

    def __init__(self, model_path: str, **options: object) -> None:
        """
        Args:
            model_path: directory or hub id.
            **options: `KitModel`'s; unless given, the kit's convention for the device holds (every GPU it sees).
        Raises:
            ConfigError, CheckpointError: as `KitModel`.
        """
        super().__init__()
        self.kit = KitModel(model_path, **options)  # type: ignore[arg-type]

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """Answer one question.

        Args:
            message: `[{"type": "image" | "text", "value": path or text}, ...]`.
            dataset: the kit's name for the benchmark.
        Raises:
            UnsupportedError: the message holds a video. ProcessorError: an image cannot be used.
        """
        (made,) = self.kit.answer([convert_message(message)])
        self.kit.log([made], [{"task": dataset}])
        return made.text

    def split_thinking(self, text: str) -> tuple[str, str]:
        """(what is judged, the thought); the kit calls it where SPLIT_THINK is set."""
        return split_thinking(text)


def register(name: str, model_path: str, **options: object) -> None:
    """Make a model known to VLMEvalKit under `name`; it is loaded when a run needs it.

    Raises:
        ImportError: VLMEvalKit is not installed.
    """
    from vlmeval.config import supported_VLM

    supported_VLM[name] = partial(MetisHomeVLMEval, model_path, **options)


def run() -> None:
    """VLMEvalKit's own command line.

    Raises:
        ImportError: VLMEvalKit is not installed.
    """
    from vlmeval.run import main

    main()


def convert_message(message: Sequence[Mapping[str, str]]) -> "list[Message]":
    """VLMEvalKit's message as a conversation of ours.

    Raises:
        UnsupportedError: it holds something else than texts and images.
    """
    blocks: list[dict[str, object]] = []
    system = [item["value"] for item in message if item.get("role") == "system"]
    for item in message:
        if item.get("role") == "system":
            continue
        if item["type"] == "text":
            blocks.append({"type": "text", "text": item["value"]})
        elif item["type"] == "image":
            blocks.append({"type": "image", "image": item["value"]})
        else:
            raise UnsupportedError(f"a message holds {item['type']}; this adapter answers about texts and images only")
    question: Message = {"role": "user", "content": blocks}
    return [{"role": "system", "content": "\n".join(system)}, question] if system else [question]
