"""Decoding compiles as one graph per kind of batch, and another mix of branches does not compile again."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from tests.model.pico import IMAGE_ROWS, collate, pico_model

OPTIONS = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    counters.clear()
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True  # generate compiles on accelerators only, unless told so
    model = pico_model()

    def generate(mix):
        return model.generate(**collate(IMAGE_ROWS), branch_ids=torch.tensor(mix), compile_config=config, **OPTIONS)

    return generate


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_three_graphs_serve_every_mix(model, compiled):
    def eager(mix):
        return model.generate(**collate(IMAGE_ROWS), branch_ids=torch.tensor(mix), **OPTIONS)

    assert torch.equal(compiled([1, 0, 0, 1]), eager([1, 0, 0, 1]))
    assert graphs() == 1, "one graph for mixed batches"
    for mix in ([0, 1, 1, 0], [1, 1, 1, 0]):
        assert torch.equal(compiled(mix), eager(mix))
    assert graphs() == 1, "another mix must not compile again"
    for branch in (0, 1, 0, 1):
        assert torch.equal(compiled([branch] * 4), eager([branch] * 4))
    assert graphs() == 3, "one graph each for the dense path of either branch"
    assert not counters["graph_break"]


def test_forward_compiles_whole(model):
    torch._dynamo.reset()
    counters.clear()
    forward = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    inputs = {"input_ids": torch.randint(10, 99, (3, 6)), "use_cache": False}
    with torch.no_grad():
        for mix in (torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1]), 0, 1):
            expected = model(**inputs, branch_ids=mix).logits
            torch.testing.assert_close(forward(**inputs, branch_ids=mix).logits, expected, atol=1e-5, rtol=1e-5)
        first = graphs()
        longer = {"input_ids": torch.randint(10, 99, (3, 11)), "use_cache": False}
        forward(**longer, branch_ids=torch.tensor([1, 1, 0]))

    assert graphs() == first, "another length must not compile again"
    assert not counters["graph_break"]
