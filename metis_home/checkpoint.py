"""Loading both key layouts: how names on disk become names in memory (compare `names.py`).

The one place that touches transformers' conversion mapping, which is public in effect and private in name.
"""

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from .config_fields import ARCHITECTURE, BASE_ARCHITECTURE

# `router` must be exempt, or model.router.* would become model.language_model.router.*
_TEXT = (r"^model(?!\.(language_model|visual|router))", "model.language_model")
_VISION = (r"^visual", "model.visual")


def register_layouts() -> None:
    """Teach transformers the hub layout of our classes; may be called again (remote code imports modules twice)."""
    # The model without a head has its vision tower under `visual`, as the hub layout spells it.
    for architecture, renamings in ((ARCHITECTURE, (_VISION, _TEXT)), (BASE_ARCHITECTURE, (_TEXT,))):
        register_checkpoint_conversion_mapping(
            architecture,
            [WeightRenaming(source_patterns=disk, target_patterns=memory) for disk, memory in renamings],
            overwrite=True,
        )
