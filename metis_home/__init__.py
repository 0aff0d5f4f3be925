"""Hybrid-thinking VLMs: Qwen2.5-VL with a thinking and a non-thinking branch per layer, and a router between them.

Importing this package registers the model with transformers' Auto classes. It does not import torch: names are loaded
when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .branch import Branch
from .errors import MetisHomeError
from .registration import register_when_transformers_loads

if TYPE_CHECKING:
    from . import ops
    from .configuration import MetisHomeConfig, MetisHomeTextConfig
    from .modeling import MetisHomeForConditionalGeneration, MetisHomeModel
    from .processing import MetisHomeProcessor
    from .prompts import SYSTEM_PROMPT
    from .router import MetisHomeRouter, RouterDecision

_HOME_OF = {
    "MetisHomeConfig": "configuration",
    "MetisHomeTextConfig": "configuration",
    "MetisHomeForConditionalGeneration": "modeling",
    "MetisHomeModel": "modeling",
    "MetisHomeProcessor": "processing",
    "MetisHomeRouter": "router",
    "RouterDecision": "router",
    "SYSTEM_PROMPT": "prompts",
}

__all__ = [
    "SYSTEM_PROMPT",
    "Branch",
    "MetisHomeConfig",
    "MetisHomeError",
    "MetisHomeForConditionalGeneration",
    "MetisHomeModel",
    "MetisHomeProcessor",
    "MetisHomeRouter",
    "MetisHomeTextConfig",
    "RouterDecision",
    "ops",
]


def __getattr__(name: str) -> object:
    if name == "ops":
        return import_module(".ops", __name__)
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_transformers_loads()
