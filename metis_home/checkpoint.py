"""Loading both key layouts: how names on disk become names in memory (compare `names.py`).

The one place that touches transformers' conversion mapping, which is public in effect and private in name.
"""

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from .config_fields import ARCHITECTURE

# `router` must be exempt, or model.router.* would become model.language_model.router.*
_HUB_TO_MODULE = [
    (r"^visual", "model.visual"),
    (r"^model(?!\.(language_model|visual|router))", "model.language_model"),
]


def register_layouts() -> None:
    """Teach transformers the hub layout of our class; may be called again (remote code imports modules twice)."""
    register_checkpoint_conversion_mapping(
        ARCHITECTURE,
        [WeightRenaming(source_patterns=disk, target_patterns=memory) for disk, memory in _HUB_TO_MODULE],
        overwrite=True,
    )
