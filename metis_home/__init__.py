"""Hybrid-thinking VLMs: Qwen2.5-VL with a thinking and a non-thinking branch per layer, and a router between them.

Importing this package registers the model with transformers' Auto classes. It does not import torch: names are loaded
when they are first used.
"""

from typing import TYPE_CHECKING

from .branch import Branch
from .errors import MetisHomeError
from .lazy import lazy_names
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
    "ops": "",
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

__getattr__, __dir__ = lazy_names(__name__, _HOME_OF)

register_when_transformers_loads()
