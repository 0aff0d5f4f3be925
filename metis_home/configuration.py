"""The configuration: a Qwen2.5-VL one, plus the branches and the router."""

# No `from __future__ import annotations`: transformers reads the annotations of these classes.
import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import GenerationConfig, PreTrainedConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)

from .branch import NUM_BRANCHES
from .config_fields import (
    MODEL_TYPE,
    ROOT_FIELDS,
    TEXT_FIELDS,
    TEXT_MODEL_TYPE,
    TOLERATED_FIELDS,
    guard_text_fields,
    unguard_text_fields,
)
from .errors import ConfigError
from .ops import BACKENDS
from .router_layout import POOLINGS


def _refuse_unknown_fields(config: PreTrainedConfig, extra: dict) -> None:
    # transformers drops generation parameters that old configs carry
    known = {*config.__dataclass_fields__, *TOLERATED_FIELDS, *GenerationConfig._get_default_generation_params()}
    for name, value in extra.items():
        if name in known or name.startswith("_"):
            continue
        near = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else " Remove it, or set it as an attribute after loading."
        raise ConfigError(f"{type(config).__name__} has no field {name!r} (found value {value!r}).{hint}")


def _check(condition: bool, field: str, found: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{field} must be {allowed}; found {found!r}")


def _is_number(value: object, kind: type = int) -> bool:
    return isinstance(value, (int, kind)) and not isinstance(value, bool)


class MetisHomeTextConfig(Qwen2_5_VLTextConfig):
    """The text decoder: all fields of `Qwen2_5_VLTextConfig`, and

    Args:
        num_experts: FFN branches per layer; 2, index 0 non-thinking, 1 thinking.
        ffn_implementation: `auto`, `torch` or `triton`; see `metis_home.ops`.
    Raises:
        ConfigError: an unknown field or a value that is not allowed.
    """

    model_type = TEXT_MODEL_TYPE
    base_model_tp_plan = {
        **{name: plan for name, plan in Qwen2_5_VLTextConfig.base_model_tp_plan.items() if ".mlp." not in name},
        "layers.*.mlp.experts.*.gate_proj": "colwise",
        "layers.*.mlp.experts.*.up_proj": "colwise",
        "layers.*.mlp.experts.*.down_proj": "rowwise",
    }

    num_experts: int = TEXT_FIELDS["num_experts"]
    ffn_implementation: str = "auto"

    def __post_init__(self, **kwargs):
        # A dense text config may still stand here: a checkpoint whose root was rewritten by hand.
        kwargs.pop("model_type", None)
        _refuse_unknown_fields(self, kwargs)
        is_two = _is_number(self.num_experts) and self.num_experts == NUM_BRANCHES
        _check(is_two, "num_experts", self.num_experts, f"{NUM_BRANCHES}")
        _check(
            self.ffn_implementation in BACKENDS,
            "ffn_implementation",
            self.ffn_implementation,
            f"one of {', '.join(BACKENDS)}",
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; takes the guard of a two-branch config.json off."""
        return super().from_dict(unguard_text_fields(config_dict), **kwargs)

    @classmethod
    def from_json_file(cls, json_file):
        """As in transformers, with the checks of `from_dict`."""
        return cls.from_dict(json.loads(Path(json_file).read_text(encoding="utf-8")))


class MetisHomeConfig(Qwen2_5_VLConfig):
    """The two-branch model: all fields of `Qwen2_5_VLConfig`, and

    Args:
        router_hidden_size: width of the router's MLP; 256 (ours).
        router_pooling: `mean` or `attention` over the prompt's input embeddings.
        router_loss_weight: weight of the router's cross entropy beside the language model's; 1.0
            (Metis-HOME: L_total = L_prediction + L_router).
        router_trained: whether the router has been trained. A fresh conversion says False, and routed generation then
            warns once.
    Raises:
        ConfigError: an unknown field or a value that is not allowed.
    """

    model_type = MODEL_TYPE
    sub_configs_defaults = {"vision_config": Qwen2_5_VLVisionConfig, "text_config": MetisHomeTextConfig}
    if not hasattr(PreTrainedConfig, "sub_configs_defaults"):  # transformers < 5.20
        sub_configs = sub_configs_defaults
        del sub_configs_defaults

    router_hidden_size: int = ROOT_FIELDS["router_hidden_size"]
    router_pooling: str = ROOT_FIELDS["router_pooling"]
    router_loss_weight: float | int = ROOT_FIELDS["router_loss_weight"]
    router_trained: bool = ROOT_FIELDS["router_trained"]

    if TYPE_CHECKING:  # transformers turns every other annotation of this class into a field
        text_config: MetisHomeTextConfig

    def __post_init__(self, **kwargs):
        kwargs.pop("model_type", None)
        if isinstance(self.vision_config, dict) and self.vision_config.get("model_type") in ("qwen2_5_vl", MODEL_TYPE):
            self.vision_config["model_type"] = Qwen2_5_VLVisionConfig.model_type  # as old checkpoints spell it
        if isinstance(self.text_config, dict):
            self.text_config = {**self.text_config, "model_type": TEXT_MODEL_TYPE}  # type: ignore[assignment]
        # Text fields may stand on the root: alone in flat configs, as copies in what transformers 4.52 to 4.57 saved.
        text_fields = MetisHomeTextConfig.__dataclass_fields__
        _refuse_unknown_fields(self, {name: kwargs[name] for name in kwargs if name not in text_fields})
        width = self.router_hidden_size
        _check(_is_number(width) and width > 0, "router_hidden_size", width, "a positive integer")
        _check(self.router_pooling in POOLINGS, "router_pooling", self.router_pooling, f"one of {', '.join(POOLINGS)}")
        weight = self.router_loss_weight
        is_weight = _is_number(weight, float) and 0 <= weight < float("inf")
        _check(is_weight, "router_loss_weight", weight, "a finite number >= 0")
        _check(isinstance(self.router_trained, bool), "router_trained", self.router_trained, "true or false")
        super().__post_init__(**kwargs)
        is_ours = isinstance(self.text_config, MetisHomeTextConfig)
        _check(is_ours, "text_config", type(self.text_config).__name__, "a MetisHomeTextConfig or a dict")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; a config of another model is refused, not reinterpreted.

        Raises:
            ConfigError: `model_type` is not `metis_home`.
        """
        found = config_dict.get("model_type", MODEL_TYPE)
        if found != MODEL_TYPE:
            hint = (
                "This is a dense checkpoint: run `metis-home convert DENSE OUT` and load OUT."
                if found == Qwen2_5_VLConfig.model_type
                else "Load it with the class of its own model."
            )
            raise ConfigError(f"expected a config with model_type {MODEL_TYPE!r}, found {found!r}. {hint}")
        config_dict = unguard_text_fields(config_dict)
        if isinstance(config_dict.get("text_config"), dict):
            config_dict = {**config_dict, "text_config": unguard_text_fields(config_dict["text_config"])}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_json_file(cls, json_file):
        """As in transformers, with the checks of `from_dict`."""
        return cls.from_dict(json.loads(Path(json_file).read_text(encoding="utf-8")))

    def to_json_file(self, json_file_path, use_diff=True):
        """As in transformers; the file refuses to be read as a dense model's (see `config_fields.GUARD`)."""
        fields = json.loads(self.to_json_string(use_diff=use_diff))
        fields["text_config"] = guard_text_fields(fields["text_config"])
        Path(json_file_path).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
