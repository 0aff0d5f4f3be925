"""Parameter names on disk and in memory: the one place that knows how they are spelled.

Two layouts of the same Qwen2.5-VL weights exist. *Hub* is what checkpoints hold and `save_pretrained` writes;
*module* is what transformers >= 4.52 has in memory, and what some trainers save:

    part      hub                               module
    vision    visual.*                          model.visual.*
    text      model.layers.*, .norm, ...        model.language_model.layers.*, ...
    router    model.router.*                    model.router.*
    head      lm_head.weight                    lm_head.weight

No imports beyond the standard library: the converter reads this without torch.
"""

import re

ROUTER_PREFIX = "model.router."
_TEXT_MODULE_PREFIX = "model.language_model."
_VISION_MODULE_PREFIX = "model.visual."

_DENSE_FFN = re.compile(r"^(?P<layer>model\.layers\.\d+)\.mlp\.(?P<linear>gate|up|down)_proj\.(?P<kind>\w+)$")
_BRANCH_FFN = re.compile(
    r"^(?P<layer>model\.layers\.\d+)\.mlp\.experts\.(?P<branch>\d+)\.(?P<linear>gate|up|down)_proj\.(?P<kind>\w+)$"
)


def to_hub_name(name: str) -> str:
    """Return `name` in the hub layout; names that already have it, or belong to neither, come back unchanged."""
    if name.startswith(_TEXT_MODULE_PREFIX):
        return "model." + name[len(_TEXT_MODULE_PREFIX) :]
    if name.startswith(_VISION_MODULE_PREFIX):
        return "visual." + name[len(_VISION_MODULE_PREFIX) :]
    return name


def is_dense_ffn(hub_name: str) -> bool:
    """Is this a text-decoder FFN weight of a dense model? Vision blocks also have `mlp.gate_proj`; they are not."""
    return _DENSE_FFN.match(hub_name) is not None


def branch_of(hub_name: str) -> int | None:
    """The branch index of a two-branch FFN weight, or None for every other name."""
    match = _BRANCH_FFN.match(hub_name)
    return int(match["branch"]) if match else None


def to_branch_name(hub_name: str, branch: int) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `model.layers.3.mlp.experts.<branch>.up_proj.weight`.

    Raises:
        ValueError: `hub_name` is not a dense text-decoder FFN weight.
    """
    match = _DENSE_FFN.match(hub_name)
    if match is None:
        raise ValueError(f"{hub_name!r} is not a dense FFN weight such as 'model.layers.0.mlp.up_proj.weight'")
    return f"{match['layer']}.mlp.experts.{int(branch)}.{match['linear']}_proj.{match['kind']}"


def to_dense_name(hub_name: str) -> str:
    """The inverse of `to_branch_name`; names that are no branch weights come back unchanged."""
    match = _BRANCH_FFN.match(hub_name)
    if match is None:
        return hub_name
    return f"{match['layer']}.mlp.{match['linear']}_proj.{match['kind']}"


def dense_name_of(name: str, branch: int) -> str | None:
    """The name that a weight of the two-branch model has in the dense model of `branch`, in the same layout.

    None for what that model does not have: the router, and the FFNs of the other branch.
    """
    hub_name = to_hub_name(name)
    if hub_name.startswith(ROUTER_PREFIX):
        return None
    owner = branch_of(hub_name)
    if owner is None:
        return name
    if owner != int(branch):
        return None
    dense_name = to_dense_name(hub_name)
    return dense_name if hub_name == name else _TEXT_MODULE_PREFIX + dense_name.removeprefix("model.")
