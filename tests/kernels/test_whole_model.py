"""The model on the `triton` backend, interpreted, is the model on the `torch` backend."""

import pytest
import torch

from metis_home import ops
from tests.model.pico import pico_model

IDS = torch.randint(5, 20, (3, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _backend_as_before():
    before = ops.get_backend()
    yield
    ops.set_backend(before)


@pytest.mark.parametrize("branches", [[0, 1, 0], [1, 1, 1]])
def test_loss_logits_and_gradients(branches) -> None:
    model = pico_model().float().train()
    branch_ids, labels = torch.tensor(branches), IDS.clone()
    labels[:, :4] = -100

    def run(backend: str):
        ops.set_backend(backend)
        model.zero_grad()
        out = model(input_ids=IDS, branch_ids=branch_ids, labels=labels, router_labels=branch_ids)
        out.loss.backward()
        return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    want, want_gradients = run("torch")
    found, gradients = run("triton")

    # float32 sums in another order
    torch.testing.assert_close(found.logits, want.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.router_logits, want.router_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, want.loss)
    assert gradients.keys() == want_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, want_gradients[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("thinking", [[True, False, True], False, "auto"])
def test_generated_tokens(thinking) -> None:
    model = pico_model().float().eval()

    def run(backend: str) -> torch.Tensor:
        ops.set_backend(backend)
        return model.generate(input_ids=IDS, thinking=thinking, max_new_tokens=3, do_sample=False)

    assert torch.equal(run("triton"), run("torch"))


def test_weights_stay_where_they_are() -> None:
    model = pico_model().float().eval()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    ops.set_backend("triton")

    with torch.no_grad():
        model(input_ids=IDS, branch_ids=torch.tensor([0, 1, 0]))

    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
