"""Make the Auto classes of transformers know this model.

`import metis_home` must do so, and must not import torch: converting needs neither. So the classes are registered the
moment transformers' own registries are imported, at once if they are already.
"""

import wrapt


def register_when_transformers_loads() -> None:
    """Arrange for the registrations below; cheap, idempotent."""
    wrapt.register_post_import_hook(_register_config, "transformers.models.auto.configuration_auto")
    wrapt.register_post_import_hook(_register_models, "transformers.models.auto.modeling_auto")
    wrapt.register_post_import_hook(_register_processor, "transformers.models.auto.processing_auto")


def _register_config(auto) -> None:
    from .configuration import MetisHomeConfig, MetisHomeTextConfig

    for config in (MetisHomeConfig, MetisHomeTextConfig):
        auto.AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models(auto) -> None:
    from .configuration import MetisHomeConfig, MetisHomeTextConfig
    from .modeling import MetisHomeForConditionalGeneration, MetisHomeModel, MetisHomeTextModel

    auto.AutoModel.register(MetisHomeConfig, MetisHomeModel, exist_ok=True)
    auto.AutoModel.register(MetisHomeTextConfig, MetisHomeTextModel, exist_ok=True)
    for head in (auto.AutoModelForImageTextToText, auto.AutoModelForMultimodalLM):
        head.register(MetisHomeConfig, MetisHomeForConditionalGeneration, exist_ok=True)


def _register_processor(auto) -> None:
    from .configuration import MetisHomeConfig
    from .processing import MetisHomeProcessor

    auto.AutoProcessor.register(MetisHomeConfig, MetisHomeProcessor, exist_ok=True)
