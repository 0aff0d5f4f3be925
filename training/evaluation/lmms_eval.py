"""lmms-eval runs our models: `lmms-eval --model metis_home --model_args pretrained=home-7b,route=auto --tasks ...`.

lmms-eval finds the model by the entry point `metis_home` of the group `lmms_eval.models`, which is `manifests` here.
Written for lmms-eval 0.7.3; its source is the reference for the names.
"""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from metis_home.errors import UnsupportedError

from .kit import KitModel

if TYPE_CHECKING:
    from metis_home.media import Message

logger = logging.getLogger(__name__)
MODEL_ID = "metis_home"


def is_lmms_eval_available() -> bool:
    """Is lmms-eval installed?"""
    return importlib.util.find_spec("lmms_eval") is not None


if is_lmms_eval_available():
    from lmms_eval.api.model import lmms as _Base
else:
    _Base = object


def manifests() -> list[object]:
    """What the entry point returns: one chat model.

    Raises:
        ImportError: lmms-eval is not installed.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id=MODEL_ID, chat_class_path=f"{__name__}.MetisHomeLmms")]


class MetisHomeLmms(_Base):
    """A two-branch or dense model as an lmms-eval chat model.

    The options of `--model_args` are those of `KitModel`. Decoding is greedy, and `max_new_tokens` is the model's option,
    not the task's. Images only.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        router_log: str | None = None,
        **options: object,
    ) -> None:
        """
        Args:
            pretrained: directory or hub id.
            batch_size, device: lmms-eval's own options.
            router_log: a sidecar file for `metis-home think-ratio`; with several processes, each writes its own.
            **options: `KitModel`'s.
        Raises:
            ConfigError, CheckpointError: as `KitModel`. TypeError: an unknown option.
        """
        super().__init__()
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
            router_log = None if router_log is None else f"{router_log}.rank{self._rank}"
        self.kit = KitModel(
            pretrained,
            batch_size=int(batch_size),
            device=device or "auto",
            router_log=router_log,
            **options,  # type: ignore[arg-type]
        )
        self.batch_size_per_gpu = int(batch_size)

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return self.batch_size_per_gpu

    def generate_until(self, requests: Sequence[object]) -> list[object]:
        """Answer every request, in order.

        Raises:
            UnsupportedError: a request holds a video or audio. ProcessorError: an image cannot be used.
        """
        from lmms_eval.api.instance import GenerationResult, TokenCounts

        conversations, names = [], []
        for request in requests:
            _, to_messages, _, doc_id, task, split = request.args  # type: ignore[attr-defined]
            conversations.append(convert_messages(to_messages(self.task_dict[task][split][doc_id])))
            names.append({"task": task, "doc_id": doc_id})
        results = []
        step = 16 * self.batch_size_per_gpu  # so that a long run is seen to move, and its sidecar grows
        for start in range(0, len(requests), step):
            answers = self.kit.answer(conversations[start : start + step])
            self.kit.log(answers, names[start : start + step])
            for request, made in zip(requests[start : start + step], answers, strict=True):
                context, _, options = request.args[:3]  # type: ignore[attr-defined]
                self.cache_hook.add_partial("generate_until", (context, options), made.text)
                counts = TokenCounts(input_tokens=made.prompt_tokens, output_tokens=made.tokens)
                results.append(GenerationResult(text=made.text, token_counts=counts))
            logger.info("answered %d of %d", len(results), len(requests))
        return results

    def loglikelihood(self, requests: Sequence[object]) -> list[tuple[float, bool]]:
        """Not offered: which branch's likelihood would it be?

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("metis_home answers by generating; choose a task with output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[object]) -> list[str]:
        """Not offered.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("metis_home answers single rounds; choose a task with output_type generate_until")


def convert_messages(messages: Sequence[object]) -> "list[Message]":
    """lmms-eval's messages (mappings or its pydantic models) as ours.

    Raises:
        UnsupportedError: a message holds a video or audio.
    """
    converted: list[Message] = []
    for message in messages:
        role, content = _field(message, "role"), _field(message, "content")
        if isinstance(content, str):
            converted.append({"role": role, "content": content})
            continue
        blocks: list[dict[str, object]] = []
        for block in cast(Sequence[object], content):
            kind = _field(block, "type")
            if kind == "text":
                blocks.append({"type": "text", "text": _field(block, "text")})
            elif kind == "image":
                blocks.append({"type": "image", "image": _field(block, "url")})
            else:
                raise UnsupportedError(f"a message holds {kind}; this adapter answers about texts and images only")
        converted.append({"role": role, "content": blocks})
    return converted


def _field(item: object, name: str) -> object:
    return item[name] if isinstance(item, Mapping) else getattr(item, name)
