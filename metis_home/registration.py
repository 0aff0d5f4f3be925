"""Make the Auto classes of transformers know this model.

`import metis_home` must do so, and must not import torch: converting needs neither. So the classes are registered when
transformers has imported its registries, at once if it already has. The registries, the stock Qwen2.5-VL modules and
ours import one another, in an order that depends on what the user imports first; registering waits until none of them
is half imported.
"""

import sys
from collections.abc import Callable
from types import ModuleType

import wrapt

_AUTO = "transformers.models.auto."
_STOCK = "transformers.models.qwen2_5_vl."
_WATCHED = (
    *(_AUTO + name for name in ("configuration_auto", "modeling_auto", "processing_auto", "tokenization_auto")),
    *(_AUTO + name for name in ("image_processing_auto", "feature_extraction_auto", "video_processing_auto")),
    *(_STOCK + name for name in ("configuration_qwen2_5_vl", "modeling_qwen2_5_vl", "processing_qwen2_5_vl")),
    "transformers.modeling_utils",
    "transformers.generation.utils",
    "transformers.processing_utils",
    *(f"{__package__}.{name}" for name in ("configuration", "modeling", "processing", "branch_mlp", "generation")),
    *(f"{__package__}.{name}" for name in ("cache_branch", "checkpoint", "export")),
)


def register_when_transformers_loads() -> None:
    """Arrange for the registrations below; cheap, idempotent."""
    imported: set[str] = set()
    registered: set[str] = set()

    def register_what_is_ready() -> None:
        # Not `_initializing` alone: a module whose hook runs has finished, though importlib still marks it.
        if any(_is_half_imported(name) for name in _WATCHED if name not in imported):
            return
        for registry, register in _REGISTRATIONS.items():
            if registry in imported and registry not in registered:
                registered.add(registry)  # first: registering imports modules whose hooks come back here
                register(sys.modules[registry])

    def hook_of(name: str) -> Callable[[ModuleType], None]:
        def hook(_: ModuleType) -> None:
            imported.add(name)
            register_what_is_ready()

        return hook

    for name in _WATCHED:
        wrapt.register_post_import_hook(hook_of(name), name)


def _is_half_imported(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _register_config(auto: ModuleType) -> None:
    from .configuration import MetisHomeConfig, MetisHomeTextConfig

    for config in (MetisHomeConfig, MetisHomeTextConfig):
        auto.AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models(auto: ModuleType) -> None:
    from .configuration import MetisHomeConfig, MetisHomeTextConfig
    from .modeling import MetisHomeForConditionalGeneration, MetisHomeModel, MetisHomeTextModel

    auto.AutoModel.register(MetisHomeConfig, MetisHomeModel, exist_ok=True)
    auto.AutoModel.register(MetisHomeTextConfig, MetisHomeTextModel, exist_ok=True)
    for head in (auto.AutoModelForImageTextToText, auto.AutoModelForMultimodalLM):
        head.register(MetisHomeConfig, MetisHomeForConditionalGeneration, exist_ok=True)


def _register_processor(auto: ModuleType) -> None:
    from .configuration import MetisHomeConfig
    from .processing import MetisHomeProcessor

    auto.AutoProcessor.register(MetisHomeConfig, MetisHomeProcessor, exist_ok=True)


_REGISTRATIONS: dict[str, Callable[[ModuleType], None]] = {
    _AUTO + "configuration_auto": _register_config,
    _AUTO + "modeling_auto": _register_models,
    _AUTO + "processing_auto": _register_processor,
}
