"""Several queries in one row: logits, losses, gradients and routing of each are those it has alone or padded.

Tolerances: packing changes the shapes of matrix products, and with them the order of float32 sums: 1e-5 of logits of
order 1 (measured: 5e-6 at most). Where neither is the case the comparison is exact.
"""

import copy
import itertools

import pytest
import torch
from transformers import AttentionInterface

from metis_home.errors import BranchError, DataError
from metis_home.router_layout import POOLINGS
from metis_home.training.data.collate import PackingCollator, PaddingCollator
from metis_home.training.data.encode import Example
from metis_home.training.data.packing import mrope_positions, pack_lengths
from tests.model.pico import dense_twin, pico_config, pico_model, row

IGNORE = -100
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def example(item, label, answer=3):
    """One row of pico as training reads it; its last `answer` tokens are supervised."""
    labels = [IGNORE] * (len(item.ids) - answer) + item.ids[len(item.ids) - answer :]
    return Example(
        input_ids=list(item.ids),
        labels=labels,
        mm_token_type_ids=item.types,
        pixel_values=item.patches,
        image_grid_thw=torch.tensor(item.grids) if item.grids else None,
        router_label=label,
        record_index=7,
        source="pico",
    )


# 0, 1 and 3 images; both branches; first, middle and last in the row.
EXAMPLES = [
    example(row(9, (1, 2, 4), seed=1), 1),
    example(row(5, seed=2), 0),
    example(row(11, (1, 4, 4), (1, 2, 2), (1, 3, 2), seed=3), 1, answer=5),
    example(row(12, seed=4), 0),
]
LENGTHS = [len(item) for item in EXAMPLES]


def packed(model, examples=EXAMPLES, **options):
    batch = PackingCollator(model.config, 0, **options)(examples)
    return {name: value for name, value in batch.items() if name != "record_index"}


def padded(examples=EXAMPLES, side="right"):
    batch = PaddingCollator(0, side)(examples)
    return {name: value for name, value in batch.items() if name != "record_index"}


def segments(logits_1TV, lengths=LENGTHS):
    return logits_1TV[0].split(lengths)


class TestEqualToEachRowAlone:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_logits_and_router_logits(self, attention):
        model = pico_model()
        model.set_attn_implementation(attention)

        with torch.no_grad():
            together = model(**packed(model))
            alone = [model(**padded([item])) for item in EXAMPLES]

        for found, expected in zip(segments(together.logits), alone, strict=True):
            torch.testing.assert_close(found, expected.logits[0], **CLOSE)
        torch.testing.assert_close(together.router_logits, torch.cat([one.router_logits for one in alone]), **CLOSE)
        assert together.past_key_values is None

    def test_each_segment_is_the_dense_model_of_its_branch(self):
        model = pico_model()
        twins = [dense_twin(model, branch) for branch in (0, 1)]

        with torch.no_grad():
            together = segments(model(**packed(model)).logits)
            for found, item in zip(together, EXAMPLES, strict=True):
                batch = {k: v for k, v in padded([item]).items() if k not in ("router_labels", "labels")}
                torch.testing.assert_close(found, twins[item.router_label](**batch).logits[0], **CLOSE)
                assert (found - twins[1 - item.router_label](**batch).logits[0]).abs().max() > 0.1

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_losses_and_gradients_equal_those_of_the_padded_batch(self, side):
        model = pico_model(router_pooling="attention")
        model.train()
        gradients = []
        for batch in (packed(model), padded(side=side)):
            model.zero_grad()
            output = model(**batch)
            output.loss.backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            gradients[-1] |= {"loss": output.lm_loss.detach(), "router loss": output.router_loss.detach()}

        first, second = gradients
        assert first.keys() == second.keys()
        assert any(grad.any() for name, grad in first.items() if "router.query" in name)
        for name in first:
            scale = second[name].abs().max().item()
            # sums over all tokens in another order; measured 3e-6 of the largest entry
            torch.testing.assert_close(first[name], second[name], atol=2e-5 * max(scale, 1e-3), rtol=0, msg=name)

    def test_the_order_of_the_segments_does_not_matter(self):
        model = pico_model()

        with torch.no_grad():
            forward = segments(model(**packed(model)).logits)
            backward = segments(model(**packed(model, EXAMPLES[::-1])).logits, LENGTHS[::-1])

        for one, other in zip(forward, reversed(backward), strict=True):
            torch.testing.assert_close(one, other, **CLOSE)

    def test_two_packed_rows_with_padding(self):
        model = pico_model()
        parts = [packed(model, EXAMPLES[:2]), packed(model, EXAMPLES[2:])]
        width = max(part["input_ids"].shape[1] for part in parts)

        def wide(name, fill):
            rows = [torch.nn.functional.pad(p[name], (0, width - p[name].shape[-1]), value=fill) for p in parts]
            return torch.cat(rows, dim=-2)

        parts[1]["query_ids"] = parts[1]["query_ids"] + 2
        batch = {"input_ids": wide("input_ids", 0), "labels": wide("labels", IGNORE)}
        batch |= {"query_ids": wide("query_ids", -1), "position_ids": wide("position_ids", 0)}
        batch |= {name: torch.cat([p[name] for p in parts]) for name in ("pixel_values", "image_grid_thw")}
        batch["router_labels"] = torch.tensor([item.router_label for item in EXAMPLES])

        with torch.no_grad():
            rows, one = model(**batch), model(**packed(model))

        torch.testing.assert_close(rows.router_logits, one.router_logits, **CLOSE)
        torch.testing.assert_close(rows.loss, one.loss, **CLOSE)

    def test_flash_attention_gets_the_bounds_of_the_segments(self):
        """Flash attention is not installed on a CPU: attention over the bounds that it would be given stands for it."""
        seen = []

        def varlen(module, query, key, value, attention_mask, **kwargs):
            bounds = kwargs["cu_seq_lens_q"].tolist()
            seen.append((bounds, kwargs["max_length_q"], kwargs["position_ids"].tolist()))
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            parts = [
                torch.nn.functional.scaled_dot_product_attention(
                    query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=kwargs["scaling"]
                )
                for a, b in itertools.pairwise(bounds)
            ]
            return torch.cat(parts, 2).transpose(1, 2), None

        AttentionInterface.register("varlen_by_bounds", varlen)
        model, usual = pico_model(), pico_model()
        model.model.language_model.config._attn_implementation = "varlen_by_bounds"

        with torch.no_grad():
            found = model(**packed(model, flash_attention=True)).logits
            expected = usual(**packed(usual)).logits

        torch.testing.assert_close(found, expected, **CLOSE)
        bounds, longest, positions = seen[0]
        assert bounds == [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
        assert longest == max(LENGTHS)
        assert positions == [[place for length in LENGTHS for place in range(length)]]


class TestRouting:
    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_the_router_never_reads_an_answer_packed(self, pooling):
        model = pico_model(router_pooling=pooling)
        torch.nn.init.normal_(model.model.router.query) if pooling == "attention" else None
        changed = copy.deepcopy(EXAMPLES)
        for item in changed:
            for place in range(len(item)):
                if item.labels[place] != IGNORE:
                    item.input_ids[place] = item.labels[place] = 77
        # an answer of another length also moves everything behind it
        changed[0].input_ids += [78] * 5
        changed[0].labels += [78] * 5
        changed[0].mm_token_type_ids += [0] * 5

        with torch.no_grad():
            before, after = model(**packed(model)), model(**packed(model, changed))

        assert torch.equal(before.router_logits, after.router_logits)
        assert not torch.equal(before.logits[:, -1], after.logits[:, -1])

    @pytest.mark.parametrize("pooling", POOLINGS)
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_the_router_never_reads_an_answer_padded(self, pooling, side):
        model = pico_model(router_pooling=pooling)
        changed = copy.deepcopy(EXAMPLES)
        for item in changed:
            for place in range(len(item)):
                if item.labels[place] != IGNORE:
                    item.input_ids[place] = item.labels[place] = 77

        with torch.no_grad():
            before, after = model(**padded(side=side)), model(**padded(changed, side))

        assert torch.equal(before.router_logits, after.router_logits)
        assert not torch.equal(before.logits, after.logits)

    @pytest.mark.parametrize("form", ["padded", "packed"])
    @pytest.mark.parametrize("labelled", [True, False], ids=["with router labels", "without"])
    def test_an_observation_inside_an_answer_is_not_pooled(self, form, labelled):
        """Of `answer, observation, answer` the observation's labels are -100 too."""
        model = pico_model()

        def with_observation(token):
            items = copy.deepcopy(EXAMPLES)
            for item in items:
                item.input_ids += [token] * 4 + [50, 51]
                item.labels += [IGNORE] * 4 + [50, 51]
                item.mm_token_type_ids += [0] * 6
            batch = packed(model, items) if form == "packed" else padded(items)
            if not labelled:
                batch.pop("router_labels")
                batch.pop("branch_ids", None)
            return batch

        with torch.no_grad():
            before, after = model(**with_observation(60)), model(**with_observation(61))
            plain = model(**(packed(model) if form == "packed" else padded()))

        assert torch.equal(before.router_logits, after.router_logits)
        torch.testing.assert_close(before.router_logits, plain.router_logits, **CLOSE)
        assert not torch.equal(before.logits[:, -1], after.logits[:, -1])

    def test_labels_send_each_segment_to_its_branch(self):
        model = pico_model()
        batch = packed(model)
        given = batch.pop("branch_ids")

        with torch.no_grad():
            output = model(**batch)

        assert torch.equal(output.branch_ids, given)
        assert output.branch_ids[0].tolist() == [item.router_label for item in EXAMPLES for _ in range(len(item))]

    def test_a_segment_without_label_follows_the_router(self):
        model = pico_model()
        examples = copy.deepcopy(EXAMPLES)
        examples[2].router_label = IGNORE
        batch = packed(model, examples)
        assert "branch_ids" not in batch

        with torch.no_grad():
            output = model(**batch)

        chosen = int(output.router_logits[2].argmax())
        assert set(segments(output.branch_ids[..., None])[2].flatten().tolist()) == {chosen}
        kept = torch.tensor([0, 1, 3])
        by_hand = torch.nn.functional.cross_entropy(output.router_logits[kept], batch["router_labels"][kept])
        torch.testing.assert_close(output.router_loss, by_hand)

    def test_route_decides_on_each_packed_prompt(self):
        model = pico_model()
        prompts = copy.deepcopy(EXAMPLES)
        for item in prompts:
            item.labels = [IGNORE] * len(item)

        with torch.no_grad():
            together = model.route(**packed(model, prompts))
            alone = [model.route(**padded([item])) for item in prompts]

        assert together.branch_ids.shape == (4,)
        torch.testing.assert_close(together.logits, torch.cat([one.logits for one in alone]), **CLOSE)


class TestFirstTokens:
    def test_a_label_on_a_first_token_is_dropped_by_collator_and_model(self):
        model = pico_model()
        examples = copy.deepcopy(EXAMPLES)
        for item in examples:
            item.labels[0] = item.input_ids[0]
        batch = packed(model, examples)
        assert torch.equal(batch["labels"], packed(model)["labels"])
        leaky = torch.tensor([[label for item in examples for label in item.labels]])

        with torch.no_grad():
            assert torch.equal(model(**{**batch, "labels": leaky}).lm_loss, model(**packed(model)).lm_loss)


class TestPositions:
    @pytest.mark.parametrize("merge", [1, 2])
    def test_mrope_positions_equal_those_of_transformers(self, merge):
        config = pico_config()
        config.vision_config.spatial_merge_size = merge
        model = pico_model()
        model.config.vision_config.spatial_merge_size = merge
        generator = torch.Generator().manual_seed(merge)
        for _ in range(20):
            sides = torch.randint(1, 7, (int(torch.randint(0, 4, (), generator=generator)), 2), generator=generator)
            grids = [(1, int(h) * merge, int(w) * merge) for h, w in sides]
            types = [0, 0]
            for _, height, width in grids:
                types += [1] * (height * width // merge**2) + [0, 0]

            found = mrope_positions(types, torch.tensor(grids) if grids else None, merge)

            expected = torch.arange(len(types)).expand(3, -1)
            if grids:
                expected = model.model.get_rope_index(
                    torch.zeros(1, len(types), dtype=torch.long), torch.tensor([types]), torch.tensor(grids)
                )[0][:, 0]
            assert torch.equal(found, expected)

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(DataError, match="videos cannot be packed"):
            mrope_positions([0, 2, 2, 0], None, 1)
        with pytest.raises(DataError, match="image tokens for more than the 0 images"):
            mrope_positions([0, 1], None, 1)
        with pytest.raises(DataError, match="needs 4 image tokens"):
            mrope_positions([0, 1, 1, 0, 0, 0], torch.tensor([[1, 2, 2]]), 1)
        with pytest.raises(DataError, match="needs 4 image tokens"):
            mrope_positions([0, 1, 1], torch.tensor([[1, 2, 2]]), 1)
        with pytest.raises(DataError, match="1 images and image tokens for 0"):
            mrope_positions([0, 0], torch.tensor([[1, 2, 2]]), 1)

    def test_models_whose_positions_are_not_known_are_refused(self):
        from transformers import Qwen2Config

        with pytest.raises(DataError, match="qwen2 model cannot be packed"):
            PackingCollator(Qwen2Config(), 0)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"query_ids": torch.zeros(1, 3, dtype=torch.long)}, "query_ids must have shape"),
            ({"query_ids": torch.zeros(1, sum(LENGTHS))}, "query_ids must be an integer tensor"),
            ({"query_ids": torch.zeros(1, sum(LENGTHS), dtype=torch.long)}, "query_ids must number 4 queries"),
            ({"position_ids": None}, "query_ids need position_ids"),
            ({"position_ids": torch.arange(sum(LENGTHS)).expand(4, 1, -1)}, r"position_ids\[0\] must count"),
            ({"attention_mask": torch.ones(1, sum(LENGTHS))}, "came with an attention_mask"),
            ({"router_labels": torch.tensor([1, 0, 0])}, "query_ids must number 3 queries"),
            ({"router_labels": torch.tensor([[1, 0, 0, 1]])}, "router_labels must have shape"),
        ],
        ids=lambda value: None if isinstance(value, str) else next(iter(value)),
    )
    def test_rows_that_are_not_packed_are_refused(self, change, message):
        model = pico_model()
        with pytest.raises(BranchError, match=message):
            model(**{**packed(model), **change})

    def test_a_query_in_two_pieces_is_refused(self):
        model = pico_model()
        batch = packed(model)
        batch["query_ids"] = torch.where(batch["query_ids"] == 3, 0, batch["query_ids"])
        with pytest.raises(BranchError, match=r"found pieces of the queries \[0, 0, 1, 2\]"):
            model(**batch)

    def test_a_cache_is_refused(self):
        from transformers import DynamicCache

        model = pico_model()
        with pytest.raises(BranchError, match="cannot continue a cache"):
            model(**packed(model), past_key_values=DynamicCache(config=model.config))

    def test_packed_prompts_without_query_ids_are_still_refused(self):
        model = pico_model()
        batch = {k: v for k, v in packed(model).items() if k not in ("query_ids", "branch_ids", "router_labels")}
        with pytest.raises(BranchError, match="packed"):
            model(**batch)


class TestBins:
    def test_best_fit_decreasing_by_hand(self):
        # 7 | 6 | 5 | then 4 beside 6 (10), 3 beside 7 (10), 3 beside 5, 2 beside those (10)
        assert pack_lengths([2, 5, 4, 7, 3, 6, 3], max_tokens=10) == [[3, 4], [5, 2], [1, 6, 0]]

    def test_every_row_is_in_one_bin_and_no_bin_overflows(self):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 400, (500,), generator=generator).tolist()

        bins = pack_lengths(lengths, max_tokens=1024)

        assert sorted(number for one in bins for number in one) == list(range(500))
        assert all(sum(lengths[number] for number in one) <= 1024 for one in bins)
        assert len(bins) <= 1.01 * sum(lengths) / 1024 + 1

    def test_at_most_so_many_rows_share_a_bin(self):
        assert pack_lengths([1, 1, 1, 1, 1], max_tokens=10, max_rows=2) == [[0, 1], [2, 3], [4]]

    def test_a_row_that_fits_no_bin_is_named(self):
        with pytest.raises(DataError, match="row 1 has 11 tokens and a packed row holds 10"):
            pack_lengths([3, 11], max_tokens=10)
