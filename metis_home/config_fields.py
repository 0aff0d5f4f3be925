"""The fields that a two-branch `config.json` has beyond a dense Qwen2.5-VL one.

Read by the configuration classes and by the converter, which writes `config.json` without torch.
No imports beyond the standard library and the router layout.
"""

from typing import Any

from .router_layout import DEFAULT_POOLING, DEFAULT_ROUTER_HIDDEN_SIZE

MODEL_TYPE = "metis_home"
TEXT_MODEL_TYPE = "metis_home_text"
ARCHITECTURE = "MetisHomeForConditionalGeneration"
BASE_ARCHITECTURE = "MetisHomeModel"
PROCESSOR_CLASS = "MetisHomeProcessor"

# On the root config, also when the source keeps its text fields flat beside them.
ROOT_FIELDS: dict[str, Any] = {
    "router_hidden_size": DEFAULT_ROUTER_HIDDEN_SIZE,
    "router_pooling": DEFAULT_POOLING,
    "router_loss_weight": 1.0,  # Metis-HOME: L_prediction and L_router weigh 1:1
    "router_trained": False,
}
# On the text config (flat configs: on the root, from where the text config picks it up).
TEXT_FIELDS = {"num_experts": 2}

# In generation_config.json: think when P(thinking) >= threshold.
GENERATION_FIELDS = {"router_threshold": 0.5}

# Fields that no configuration class declares and that checkpoints of Qwen2.5-VL and its fine-tunes carry all the same.
# Every other unknown field is refused on loading.
TOLERATED_FIELDS = frozenset(
    """
    add_cross_attention auto_map attn_implementation chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id experts_implementation finetuning_task id2label in_chans is_decoder is_encoder_decoder
    label2id model_type mrope_section name_or_path num_labels output_attentions output_hidden_states per_layer_config
    prefix problem_type pruned_heads quantization_config return_dict rope_parameters rope_scaling rope_theta
    sep_token_id spatial_patch_size task_specific_params tf_legacy_loss tie_encoder_decoder tie_word_embeddings
    tokenizer_class torch_dtype torchscript transformers_version use_bfloat16 use_return_dict vision_token_id
    """.split()
)

# Stock Qwen2.5-VL classes would load a two-branch checkpoint with a warning and fill the FFNs with random numbers. So a
# two-branch config.json holds a text where their strict configuration wants a number: they refuse it, and their error
# shows the text. Ours puts the number back.
GUARDED_FIELD = "max_window_layers"
GUARD = "two-branch checkpoint: load it with metis_home, or split it first (metis-home split)"
GUARDED_VALUE_FIELD = "guarded_max_window_layers"


def guard_text_fields(fields: dict) -> dict:
    """Return the text fields (of `text_config`, or a flat root) as they stand in a two-branch config.json."""
    if fields.get(GUARDED_FIELD) == GUARD:
        return fields
    return {**fields, GUARDED_FIELD: GUARD, GUARDED_VALUE_FIELD: fields.get(GUARDED_FIELD)}


def unguard_text_fields(fields: dict) -> dict:
    """The inverse of `guard_text_fields`; fields without the guard come back unchanged."""
    if fields.get(GUARDED_FIELD) != GUARD:
        return fields
    fields = dict(fields)
    value = fields.pop(GUARDED_VALUE_FIELD, None)
    if value is None:
        del fields[GUARDED_FIELD]
    else:
        fields[GUARDED_FIELD] = value
    return fields
