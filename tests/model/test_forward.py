"""The forward pass: each row equals the dense model of its branch; losses; packed rows; checkpointing; bad input."""

import copy

import pytest
import torch

from metis_home import Branch
from metis_home.errors import BranchError
from tests.model.pico import IMAGE_ROWS, MIX, TEXT_ROWS, VIDEO_ROWS, collate, dense_twin, pico_model, row

IGNORE = -100


def labelled(rows):
    """A batch whose last three tokens per row are the answer."""
    batch = collate(rows)
    labels = batch["input_ids"].clone()
    labels[:, :-3] = IGNORE
    return batch, labels


@pytest.mark.parametrize("branch", list(Branch))
@pytest.mark.parametrize("rows", [IMAGE_ROWS, VIDEO_ROWS, TEXT_ROWS], ids=["images", "videos", "text"])
def test_one_branch_is_the_dense_model_bit_for_bit(model, twins, rows, branch):
    batch = collate(rows)

    with torch.no_grad():
        ours = model(**batch, branch_ids=branch, output_hidden_states=True)
        dense = twins[branch](**batch, output_hidden_states=True)

    assert torch.equal(ours.logits, dense.logits)
    assert len(ours.hidden_states) == len(dense.hidden_states) == 3
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, dense.hidden_states, strict=True))
    assert ours.router_logits is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_rows_equal_their_dense_models(model, twins, side):
    batch = collate(IMAGE_ROWS, side)

    with torch.no_grad():
        mixed = model(**batch, branch_ids=torch.tensor(MIX)).logits
        dense = [twin(**batch).logits for twin in twins]

    for index, branch in enumerate(MIX):
        # other rows change the shapes of the matrix products, and with them the last bit
        torch.testing.assert_close(mixed[index], dense[branch][index], atol=1e-5, rtol=1e-5)
        assert (mixed[index] - dense[1 - branch][index]).abs().max() > 0.1


@pytest.mark.parametrize("ids", [1, torch.tensor([1]), torch.full((1, 9), 1)], ids=["int", "(B,)", "(B, T)"])
def test_all_spellings_of_one_branch_agree(model, ids):
    batch = collate(TEXT_ROWS[:1])

    with torch.no_grad():
        assert torch.equal(model(**batch, branch_ids=ids).logits, model(**batch, branch_ids=1).logits)


def test_packed_rows_equal_separate_dense_runs(model, twins):
    segments = [(9, 1), (5, 0), (7, 1)]
    ids = [torch.tensor(row(length, seed=length).ids) for length, _ in segments]
    positions = torch.cat([torch.arange(length) for length, _ in segments])[None, None].expand(4, 1, -1)
    per_token = torch.cat([torch.full((length,), branch) for length, branch in segments])[None]

    with torch.no_grad():
        packed = model(
            input_ids=torch.cat(ids)[None], position_ids=positions, branch_ids=per_token, use_cache=False
        ).logits[0]
        alone = [
            twins[b](input_ids=x[None], use_cache=False).logits[0] for x, (_, b) in zip(ids, segments, strict=True)
        ]

    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=1e-4)
    with pytest.raises(BranchError, match="packed"):
        model(input_ids=torch.cat(ids)[None], position_ids=positions, use_cache=False)


def test_without_branch_ids_the_router_decides(model):
    batch = collate(IMAGE_ROWS)
    with torch.no_grad():
        decision = model.route(**batch)
        routed = model(**batch)

        assert torch.equal(routed.branch_ids, decision.branch_ids)
        assert torch.equal(routed.router_logits, decision.logits)
        assert torch.equal(routed.logits, model(**batch, branch_ids=decision.branch_ids).logits)


def test_outputs_as_a_tuple(model):
    batch = collate(TEXT_ROWS)
    with torch.no_grad():
        as_tuple = model(**batch, branch_ids=1, return_dict=False, use_cache=False)
        as_dict = model(**batch, branch_ids=1, use_cache=False)

    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], as_dict.logits)


class TestLosses:
    def test_the_loss_is_prediction_plus_weighted_router_loss(self):
        model = pico_model(router_loss_weight=0.25)
        batch, labels = labelled(IMAGE_ROWS)
        router_labels = torch.tensor([1, 0, IGNORE, 1])

        output = model(**batch, labels=labels, router_labels=router_labels)

        kept = router_labels != IGNORE
        by_hand = torch.nn.functional.cross_entropy(output.router_logits[kept], router_labels[kept])
        torch.testing.assert_close(output.router_loss, by_hand)
        torch.testing.assert_close(output.loss, output.lm_loss + 0.25 * output.router_loss)
        assert pico_model().config.router_loss_weight == 1.0

    def test_rows_go_to_the_branch_of_their_label_and_unlabelled_ones_to_the_routers(self, model):
        batch, labels = labelled(TEXT_ROWS)
        mask = batch["attention_mask"] * (labels == IGNORE)
        decided = model.route(**{**batch, "attention_mask": mask}).branch_ids

        output = model(**batch, labels=labels, router_labels=torch.tensor([1, 0, IGNORE, IGNORE]))

        assert output.branch_ids.tolist() == [1, 0, int(decided[2]), int(decided[3])]

    def test_prediction_loss_equals_the_dense_models(self, model, twins):
        batch, labels = labelled(IMAGE_ROWS)

        for branch in (0, 1):
            ours = model(**batch, labels=labels, branch_ids=branch)
            assert torch.equal(ours.loss, twins[branch](**batch, labels=labels).loss)
            assert ours.router_loss is None

    def test_the_router_never_reads_the_answer(self, model):
        batch, labels = labelled(IMAGE_ROWS)
        before = model(**batch, labels=labels, router_labels=torch.tensor(MIX)).router_logits

        changed = copy.deepcopy(batch)
        changed["input_ids"][:, -3:] = 77
        changed_labels = torch.where(labels == IGNORE, labels, torch.tensor(77))
        after = model(**changed, labels=changed_labels, router_labels=torch.tensor(MIX)).router_logits

        assert torch.equal(before, after)

    def test_no_labelled_query_means_no_router_loss_and_no_nan(self, model):
        batch, labels = labelled(TEXT_ROWS)

        output = model(**batch, labels=labels, router_labels=torch.full((4,), IGNORE))

        assert output.router_loss.item() == 0.0
        assert torch.isfinite(output.loss)

    def test_router_labels_alone_train_the_router_alone(self):
        model = pico_model().train()

        loss = model(**collate(IMAGE_ROWS), router_labels=torch.tensor(MIX)).loss
        loss.backward()

        assert model.model.router.hidden.weight.grad.abs().sum() > 0
        assert all(p.grad is None or not p.grad.any() for p in model.model.language_model.layers.parameters())


class TestGradients:
    def gradients(self, model, checkpointing, rows=IMAGE_ROWS, **options):
        model = copy.deepcopy(model).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "re"})
            model.enable_input_require_grads()
        batch, labels = labelled(rows)
        output = model(**batch, labels=labels, use_cache=False, **options)
        output.loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    def test_mixed_gradients_equal_those_of_the_dense_models(self, model):
        ours = self.gradients(model, None, branch_ids=torch.tensor([1, 0, 0, 1]))
        twins = [dense_twin(model, branch).train() for branch in Branch]
        _, labels = labelled(IMAGE_ROWS)
        total = torch.zeros(())
        # the same mean over the same answer tokens, row by row through the dense models
        count = (labels[:, 1:] != IGNORE).sum()
        for item, branch in zip(IMAGE_ROWS, MIX, strict=True):
            single = collate([item])
            logits = twins[branch](**single).logits[0, :-1].float()
            target = single["input_ids"][0, 1:].clone()
            target[:-3] = IGNORE
            total = total + torch.nn.functional.cross_entropy(logits, target, reduction="sum") / count
        total.backward()

        for branch in Branch:
            for layer in range(2):
                for linear in ("gate", "up", "down"):
                    name = f"model.language_model.layers.{layer}.mlp"
                    dense = dict(twins[branch].named_parameters())[f"{name}.{linear}_proj.weight"].grad
                    got = ours[f"{name}.experts.{int(branch)}.{linear}_proj.weight"]
                    torch.testing.assert_close(got, dense, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("checkpointing", ["re", "non-re"])
    @pytest.mark.parametrize("branch_ids", [1, torch.tensor(MIX)], ids=["one", "mixed"])
    def test_checkpointing_changes_no_gradient(self, model, checkpointing, branch_ids):
        plain = self.gradients(model, None, branch_ids=branch_ids)
        checkpointed = self.gradients(model, checkpointing, branch_ids=branch_ids)

        for name, gradient in plain.items():
            if gradient is not None and ".visual." not in name:
                torch.testing.assert_close(checkpointed[name], gradient, msg=name)

    @pytest.mark.parametrize("branch_ids", [1, torch.tensor([1, 1, 1, 1])], ids=["int", "tensor"])
    def test_the_branch_without_rows_gets_zeros_not_none(self, model, branch_ids):
        gradients = self.gradients(model, None, branch_ids=branch_ids)

        for name, gradient in gradients.items():
            if ".mlp.experts.0." in name:
                assert gradient is not None, name
                assert not gradient.any(), name
            if ".mlp.experts.1." in name:
                assert gradient.any(), name

    def test_training_one_branch_is_still_the_dense_forward_bit_for_bit(self, model, twins):
        trained = copy.deepcopy(model).train()
        batch = collate(IMAGE_ROWS)

        assert torch.equal(trained(**batch, branch_ids=1).logits, twins[1].train()(**batch).logits)
        twins[1].eval()


class TestBadInput:
    @pytest.mark.parametrize(
        "branch_ids",
        [
            2,
            -1,
            True,
            "thinking",
            1.0,
            [1, 0, 0, 1],
            torch.tensor([1, 0]),
            torch.tensor([[1, 0], [0, 1]]),
            torch.tensor(1),
            torch.tensor([1, 0, 3, 0]),
            torch.tensor([True, False, True, False]),
            torch.tensor([1.0, 0.0, 0.0, 1.0]),
        ],
        ids=str,
    )
    def test_branch_ids_that_name_no_branch(self, model, branch_ids):
        with pytest.raises(BranchError, match="branch_ids must .*found"):
            model(**collate(TEXT_ROWS), branch_ids=branch_ids)

    @pytest.mark.parametrize(
        "router_labels",
        [torch.tensor([1, 0]), torch.tensor([1, 0, 2, 1]), torch.tensor([1.0, 0, 0, 1]), [1, 0, 0, 1], 1],
        ids=str,
    )
    def test_router_labels_that_do_not_fit(self, model, router_labels):
        with pytest.raises(BranchError, match="router_labels must .*found"):
            model(**collate(TEXT_ROWS), router_labels=router_labels)

    def test_a_mask_that_hides_the_rows_cannot_be_routed_on(self, model):
        with pytest.raises(BranchError, match="attention_mask must have shape"):
            model(input_ids=torch.ones(2, 3, dtype=torch.long), attention_mask=torch.ones(2, 1, 3, 3))

    def test_the_text_model_alone_cannot_route(self, model):
        with pytest.raises(BranchError, match="cannot route by itself"):
            model.model.language_model(input_ids=torch.ones(1, 3, dtype=torch.long))
        with torch.no_grad():
            model.model.language_model(input_ids=torch.ones(1, 3, dtype=torch.long), branch_ids=1)


def test_an_empty_batch_and_one_token_are_ordinary_input(model):
    with torch.no_grad():
        one = model(input_ids=torch.tensor([[7]]), use_cache=False)

    assert one.logits.shape == (1, 1, 99)
