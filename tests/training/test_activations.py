"""The counted bytes are those that a real forward saves, on the CPU, to the byte."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from metis_home.modeling import MetisHomeTextModel
from metis_home.training.activations import count_activations, saved_bytes
from metis_home.training.shapes import two_branch_shape
from tests.model.pico import pico_config


def really_saved(config, layers: int, tokens: int, attention: str) -> int:
    text = deepcopy(config.text_config)
    text.num_hidden_layers, text.layer_types = layers, ["full_attention"] * layers
    text._attn_implementation = attention
    model = MetisHomeTextModel(text).train()
    embeds = torch.randn(2, tokens // 2, text.hidden_size, requires_grad=True)
    positions = torch.arange(tokens // 2).expand(3, 2, -1)
    branch_ids = torch.tensor([0, 1])
    return saved_bytes(
        lambda: model(inputs_embeds=embeds, position_ids=positions, branch_ids=branch_ids, use_cache=False),
        [*model.parameters(), *model.buffers()],
    )


@pytest.mark.parametrize("tokens", [64, 250])
@pytest.mark.parametrize(("counted", "real"), [("fused", "sdpa"), ("eager", "eager")])
def test_a_decoder_layer_is_counted_to_the_byte(tokens: int, counted: str, real: str) -> None:
    config = pico_config()

    count = count_activations(config, tokens=tokens, patches=0, dtype=torch.float32, attention=counted)

    layer = really_saved(config, 2, tokens, real) - really_saved(config, 1, tokens, real)
    assert count.decoder_layer == layer


def test_only_eager_attention_grows_with_the_square_of_the_length() -> None:
    config = pico_config()

    def layer(tokens: int, attention: str) -> int:
        return count_activations(
            config, tokens=tokens, patches=0, dtype=torch.float32, attention=attention
        ).decoder_layer

    assert layer(512, "fused") == 2 * layer(256, "fused")
    assert layer(512, "eager") > 2.2 * layer(256, "eager")


def test_72b_is_counted_without_its_memory() -> None:
    count = count_activations(two_branch_shape("72b"), tokens=8192, patches=16384, dtype=torch.bfloat16)

    assert count.layer_input == 8192 * 8192 * 2
    assert count.decoder_layer > 10 * count.layer_input
    assert count.head > 8192 * 152064 * 4


def test_weights_and_views_are_not_counted_twice() -> None:
    layer = nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)

    assert saved_bytes(lambda: layer(x) * layer(x.view(4, 8)), layer.parameters()) == 3 * 4 * 8 * 4  # x, two outputs
