"""The fields that a two-branch `config.json` has beyond a dense Qwen2.5-VL one.

Read by the configuration classes and by the converter, which writes `config.json` without torch.
No imports beyond the standard library and the router layout.
"""

from .router_layout import DEFAULT_POOLING, DEFAULT_ROUTER_HIDDEN_SIZE

MODEL_TYPE = "metis_home"
TEXT_MODEL_TYPE = "metis_home_text"
ARCHITECTURE = "MetisHomeForConditionalGeneration"
PROCESSOR_CLASS = "MetisHomeProcessor"

# On the root config, also when the source keeps its text fields flat beside them.
ROOT_FIELDS = {
    "router_hidden_size": DEFAULT_ROUTER_HIDDEN_SIZE,
    "router_pooling": DEFAULT_POOLING,
    "router_loss_weight": 1.0,  # Metis-HOME: L_prediction and L_router weigh 1:1
    "router_trained": False,
}
# On the text config (flat configs: on the root, from where the text config picks it up).
TEXT_FIELDS = {"num_experts": 2}

# In generation_config.json: think when P(thinking) >= threshold.
GENERATION_FIELDS = {"router_threshold": 0.5}
