"""Parameter names translate between layouts and between the two-branch and the dense model."""

import pytest

from metis_home.names import branch_of, dense_name_of, is_dense_ffn, to_branch_name, to_dense_name, to_hub_name

PAIRS = {
    "model.language_model.layers.3.mlp.up_proj.weight": "model.layers.3.mlp.up_proj.weight",
    "model.language_model.norm.weight": "model.norm.weight",
    "model.visual.blocks.0.mlp.up_proj.weight": "visual.blocks.0.mlp.up_proj.weight",
    "model.router.hidden.weight": "model.router.hidden.weight",
    "lm_head.weight": "lm_head.weight",
}


@pytest.mark.parametrize(("module_name", "hub_name"), PAIRS.items())
def test_both_layouts_have_one_hub_name(module_name, hub_name):
    assert to_hub_name(module_name) == hub_name
    assert to_hub_name(hub_name) == hub_name


@pytest.mark.parametrize("branch", [0, 1])
def test_branch_names_and_back(branch):
    dense = "model.layers.12.mlp.gate_proj.weight"

    ours = to_branch_name(dense, branch)

    assert ours == f"model.layers.12.mlp.experts.{branch}.gate_proj.weight"
    assert (branch_of(ours), to_dense_name(ours)) == (branch, dense)


def test_vision_ffns_are_no_branches():
    assert not is_dense_ffn("visual.blocks.0.mlp.gate_proj.weight")
    with pytest.raises(ValueError, match="is not a dense FFN weight"):
        to_branch_name("visual.blocks.0.mlp.gate_proj.weight", 0)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_the_dense_model_of_a_branch_has_its_ffns_and_everything_shared(prefix):
    up = f"{prefix}layers.0.mlp.experts.1.up_proj.weight"

    assert dense_name_of(up, 1) == f"{prefix}layers.0.mlp.up_proj.weight"
    assert dense_name_of(up, 0) is None
    assert dense_name_of(f"{prefix}norm.weight", 0) == f"{prefix}norm.weight"
    assert dense_name_of("model.router.norm.weight", 1) is None
