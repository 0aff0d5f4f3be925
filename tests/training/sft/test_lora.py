"""Adapters on the experts of one branch: only they train, and they survive saving, loading and merging."""

import pytest
import torch

from metis_home import MetisHomeForConditionalGeneration
from metis_home.errors import RecipeError, TrainingError
from metis_home.training.sft import MetisSFTTrainer, branch_lora_config, merge_branch_lora
from tests.training.sft.small import batch_of, config, processor, records, rows, small_model

peft = pytest.importorskip("peft")


def adapted(out, branch: str, model=None, *, train_router: bool = True, **settings) -> MetisSFTTrainer:
    return MetisSFTTrainer(
        small_model() if model is None else model,
        config(out, per_device_train_batch_size=4, learning_rate=1e-2, **settings),
        train_dataset=records(8),
        processing_class=processor(),
        peft_config=branch_lora_config(branch, r=4, train_router=train_router),
    )


@pytest.mark.parametrize(("branch", "index"), [("thinking", "1"), ("non_thinking", "0")])
def test_only_the_adapters_of_that_branch_and_the_router_move(tmp_path, branch: str, index: str) -> None:
    run = adapted(tmp_path, branch, weight_decay=0.1)
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}

    run.train()

    moved = [name for name, parameter in run.model.named_parameters() if not torch.equal(parameter, before[name])]
    experts = [name for name in moved if ".experts." in name]
    assert experts
    assert all(f".experts.{index}." in name and "lora_" in name for name in experts)
    assert all("router.modules_to_save" in name for name in set(moved) - set(experts))
    assert set(moved) - set(experts)


def test_a_saved_adapter_loads_and_merges_into_the_same_model(tmp_path) -> None:
    run = adapted(tmp_path, "thinking")
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    batch = batch_of(rows(4))
    batch.pop("record_index")
    trained = run.model.eval()(**batch)

    loaded = peft.PeftModel.from_pretrained(small_model(), tmp_path / "adapter").eval()
    merged = merge_branch_lora(loaded)
    merged.save_pretrained(tmp_path / "merged")

    model = MetisHomeForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    assert model.config.router_trained
    again = model(**batch)
    torch.testing.assert_close(again.logits, trained.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.router_logits, trained.router_logits, rtol=1e-6, atol=1e-7)
    assert not torch.equal(again.logits, small_model().eval()(**batch).logits)
    plain = small_model().state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, plain[name])}
    assert all(".experts.1." in name or ".router." in name for name in changed)


def test_an_adapter_run_resumes_bit_for_bit(tmp_path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = adapted(tmp_path / "whole", "thinking", **settings)
    whole.train()
    again = adapted(tmp_path / "whole", "thinking", **settings)

    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))

    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_a_router_outside_the_adapter_stays_as_it_is(tmp_path) -> None:
    run = adapted(tmp_path, "both", train_router=False)

    run.train()

    assert not run.trains_router
    assert run.model.get_base_model().config.router_trained is False
    names = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert {".experts.0." in name for name in names} == {True, False}
    assert all("lora_" in name for name in names)


def test_what_does_not_go_together_is_refused(tmp_path) -> None:
    with pytest.raises(RecipeError, match="branch must be one of"):
        branch_lora_config("slow")  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="leave `freeze`"):
        adapted(tmp_path, "thinking", freeze=["vision"])
