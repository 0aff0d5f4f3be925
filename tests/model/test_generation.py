"""A mixed batch generates, per row, exactly the tokens that the dense model of that row's branch generates alone."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache, TextStreamer

from metis_home.errors import BranchError, CacheBranchError, UnsupportedError
from metis_home.router import MetisHomeRouter
from tests.model.pico import IMAGE_ROWS, MIX, TEXT_ROWS, VIDEO_ROWS, collate, row

NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def dense_tokens(twins, rows, branches, **options):
    """The new tokens of each row, alone, through the dense model of its branch."""
    options = {**GREEDY, **options}
    new = options["max_new_tokens"]
    alone = [twins[b].generate(**collate([item]), **options)[:, -new:] for item, b in zip(rows, branches, strict=True)]
    return torch.cat(alone)


@pytest.fixture
def router_calls(monkeypatch):
    """Counts how often the router runs."""
    calls = []
    forward = MetisHomeRouter.forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MetisHomeRouter, "forward", counted)
    return calls


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, several returned": {"num_beams": 4, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "beams, no cache": {"num_beams": 2, "use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams, static cache": {"cache_implementation": "static", "num_beams": 2},
    "chunked prefill": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("rows", [IMAGE_ROWS, VIDEO_ROWS, TEXT_ROWS], ids=["images", "videos", "text"])
@pytest.mark.parametrize("way", WAYS)
def test_each_row_of_a_mixed_batch_equals_its_dense_model(model, twins, rows, way, router_calls):
    if way == "chunked prefill" and Version(transformers.__version__) < Version("5.19"):
        pytest.skip(
            "stock Qwen2.5-VL fails too: before transformers 5.19 chunks slice 3-D positions along the wrong axis"
        )
    batch = collate(rows)

    output = model.generate(**batch, branch_ids=torch.tensor(MIX), **GREEDY, **WAYS[way])

    new_tokens = output[:, batch["input_ids"].shape[1] :]
    assert torch.equal(new_tokens, dense_tokens(twins, rows, MIX, **WAYS[way]))
    other = dense_tokens(twins, rows, [1 - branch for branch in MIX], **WAYS[way])
    assert not torch.equal(new_tokens, other), "the branches must be told apart, or this test proves nothing"
    assert not router_calls, "a forced branch must not cost a router call"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(model, twins, implementation):
    changed = copy.deepcopy(model)
    changed.set_attn_implementation(implementation)
    batch = collate(IMAGE_ROWS)

    output = changed.generate(**batch, branch_ids=torch.tensor(MIX), **GREEDY)

    assert torch.equal(output[:, batch["input_ids"].shape[1] :], dense_tokens(twins, IMAGE_ROWS, MIX))


@pytest.mark.parametrize("branch", [0, 1])
def test_one_branch_is_the_dense_model_bit_for_bit(model, twins, branch):
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}

    ours = model.generate(**collate(IMAGE_ROWS), thinking=bool(branch), **options)
    dense = twins[branch].generate(**collate(IMAGE_ROWS), **options)

    assert torch.equal(ours.sequences, dense.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, dense.logits, strict=True))


def test_sampling_with_a_seed_equals_the_dense_model(model, twins):
    options = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 3, "top_k": 20, "temperature": 1.3}
    for branch in (0, 1):
        torch.manual_seed(5)
        ours = model.generate(**collate(IMAGE_ROWS), thinking=bool(branch), **options)
        torch.manual_seed(5)
        dense = twins[branch].generate(**collate(IMAGE_ROWS), **options)

        assert ours.shape[0] == 3 * len(IMAGE_ROWS)
        assert torch.equal(ours, dense)


@pytest.mark.parametrize("branch", [0, 1])
def test_generation_from_embeddings(model, twins, branch):
    batch = collate(TEXT_ROWS[:1])
    inputs = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]),
        "attention_mask": batch["attention_mask"],
    }

    ours = model.generate(**inputs, thinking=bool(branch), **GREEDY)

    assert torch.equal(ours, twins[branch].generate(**inputs, **GREEDY))


def test_embeddings_route_like_their_tokens(model):
    batch = collate(TEXT_ROWS)
    options = {"max_new_tokens": 1, "return_dict_in_generate": True}

    by_ids = model.generate(**batch, **options)
    by_embeddings = model.generate(
        inputs_embeds=model.get_input_embeddings()(batch["input_ids"]),
        attention_mask=batch["attention_mask"],
        **options,
    )

    assert torch.equal(by_ids.thinking_probability, by_embeddings.thinking_probability)


@pytest.mark.parametrize("branch", [0, 1])
def test_prompt_lookup(model, twins, branch):
    item = row(8, seed=7)
    repeated = type(item)(item.ids * 3)

    ours = model.generate(**collate([repeated]), thinking=bool(branch), prompt_lookup_num_tokens=3, **GREEDY)

    assert torch.equal(ours, twins[branch].generate(**collate([repeated]), **GREEDY))


@pytest.mark.parametrize("dense_assistant", [False, True])
def test_assisted_decoding(model, twins, dense_assistant):
    item = row(8, seed=7)
    assistant = twins[0] if dense_assistant else copy.deepcopy(model)

    ours = model.generate(**collate([item]), thinking=True, assistant_model=assistant, **GREEDY)

    assert torch.equal(ours, twins[1].generate(**collate([item]), **GREEDY))


def test_streaming(model, twins):
    class Words:
        def decode(self, ids, **_):
            return "".join(f"{int(token)} " for token in ids)

    class Collector(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)

    pieces: list[str] = []
    item = row(6, seed=3)

    model.generate(**collate([item]), thinking=True, streamer=Collector(Words(), skip_prompt=True), **GREEDY)

    expected = dense_tokens(twins, [item], [1])[0].tolist()
    assert [int(word) for word in "".join(pieces).split()] == expected


class TestRouting:
    def test_the_router_runs_once_per_generate_call(self, model, router_calls):
        model.generate(**collate(IMAGE_ROWS), num_beams=2, **GREEDY)

        assert len(router_calls) == 1

    def test_the_routed_answer_is_the_forced_answer_of_the_routed_branch(self, model):
        batch = collate(IMAGE_ROWS)
        decision = model.route(**batch)
        highest = decision.thinking_probability.max().item()

        routed = model.generate(**batch, router_threshold=highest, return_dict_in_generate=True, **GREEDY)

        expected = (decision.thinking_probability >= highest).long()
        assert torch.equal(routed.branch_ids, expected)
        assert expected.sum() == 1
        assert not torch.equal(expected, decision.branch_ids), "the default threshold must decide otherwise"
        assert torch.equal(routed.thinking_probability, decision.thinking_probability)
        assert torch.equal(routed.sequences, model.generate(**batch, branch_ids=expected, **GREEDY))

    def test_the_decision_is_repeated_for_every_returned_sequence(self, model):
        output = model.generate(
            **collate(TEXT_ROWS),
            branch_ids=torch.tensor(MIX),
            num_beams=4,
            num_return_sequences=2,
            return_dict_in_generate=True,
            **GREEDY,
        )

        assert output.branch_ids.tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
        assert output.thinking_probability is None

    def test_a_list_forces_some_queries_and_routes_the_others(self, model):
        batch = collate(TEXT_ROWS)
        routed = model.route(**batch).branch_ids

        output = model.generate(
            **batch, thinking=[True, False, None, None], max_new_tokens=1, return_dict_in_generate=True
        )

        assert output.branch_ids.tolist() == [1, 0, int(routed[2]), int(routed[3])]

    def test_threshold_0_always_thinks_and_1_never_does_in_practice(self, model):
        batch = collate(TEXT_ROWS)

        assert model.route(**batch, router_threshold=0.0).branch_ids.tolist() == [1, 1, 1, 1]
        assert model.route(**batch, router_threshold=0).branch_ids.tolist() == [1, 1, 1, 1]
        assert model.route(**batch, router_threshold=1.0).branch_ids.tolist() == [0, 0, 0, 0]

    def test_defaults_come_from_the_generation_config_and_survive_saving(self, model, tmp_path):
        changed = copy.deepcopy(model)
        changed.generation_config.router_threshold = 0.0
        changed.save_pretrained(tmp_path)
        changed = type(model).from_pretrained(tmp_path)
        batch = collate(TEXT_ROWS)
        options = {"max_new_tokens": 1, "return_dict_in_generate": True}

        assert changed.generate(**batch, **options).branch_ids.tolist() == [1, 1, 1, 1]
        assert changed.generate(**batch, router_threshold=1.0, **options).branch_ids.tolist() == [0, 0, 0, 0]
        changed.generation_config.thinking = False
        assert changed.generate(**batch, **options).branch_ids.tolist() == [0, 0, 0, 0]
        assert changed.generate(**batch, thinking="auto", **options).branch_ids.tolist() == [1, 1, 1, 1]

    def test_an_untrained_router_warns_once_and_only_when_it_is_asked(self, model, caplog, monkeypatch):
        monkeypatch.setattr(model.config, "router_trained", False)
        from transformers.utils import logging as transformers_logging

        transformers_logging.get_logger("metis_home.generation").warning_once.cache_clear()
        monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
        monkeypatch.setattr(transformers_logging.get_logger("metis_home"), "propagate", True)

        model.generate(**collate(TEXT_ROWS), thinking=True, max_new_tokens=1)
        assert "router has not been trained" not in caplog.text
        model.generate(**collate(TEXT_ROWS), max_new_tokens=1)
        model.generate(**collate(TEXT_ROWS), max_new_tokens=1)
        assert caplog.text.count("router has not been trained") == 1
        assert "router_labels" in caplog.text


class TestReusedCaches:
    def turn(self, generator, prompt, cache, **options):
        return generator.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **GREEDY, **options
        )

    def test_a_second_turn_continues_with_the_branch_of_the_first(self, model, twins, router_calls):
        first = collate([TEXT_ROWS[0]])["input_ids"]
        answers = []
        for generator, options in ((model, {"thinking": True}), (twins[1], {})):
            cache = DynamicCache(config=generator.config.get_text_config())
            said = self.turn(generator, first, cache, **options)
            follow_up = torch.cat([said, torch.tensor([[20, 21, 22]])], dim=1)
            answers.append(self.turn(generator, follow_up, cache))

        assert torch.equal(*answers)
        assert not router_calls, "neither the forced turn nor the one that continues it asks the router"

    def test_mixed_batches_continue_too(self, model):
        rows = [row(6, seed=1), row(6, seed=2)]
        prompt = collate(rows)["input_ids"]
        cache = DynamicCache(config=model.config.get_text_config())
        said = self.turn(model, prompt, cache, thinking=[True, False], return_dict_in_generate=True)
        follow_up = torch.cat([said.sequences, torch.tensor([[20, 21], [30, 31]])], dim=1)

        continued = self.turn(model, follow_up, cache, return_dict_in_generate=True)

        assert continued.branch_ids.tolist() == [1, 0]
        fresh = model.generate(input_ids=follow_up, thinking=[True, False], **GREEDY)
        assert torch.equal(continued.sequences, fresh)

    def test_another_branch_on_the_same_cache_is_refused(self, model):
        prompt = collate([TEXT_ROWS[0]])["input_ids"]
        cache = DynamicCache(config=model.config.get_text_config())
        said = self.turn(model, prompt, cache, thinking=True)

        with pytest.raises(CacheBranchError, match="filled with branch_ids 1, now 0"):
            self.turn(model, torch.cat([said, said[:, :1]], dim=1), cache, thinking=False)

    def test_a_reset_cache_may_serve_the_other_branch(self, model, twins):
        prompt = collate([TEXT_ROWS[0]])["input_ids"]
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=32)
        self.turn(model, prompt, cache, thinking=True)
        cache.reset()

        answered = self.turn(model, prompt, cache, thinking=False)

        assert torch.equal(answered, twins[0].generate(input_ids=prompt, **GREEDY))
        with pytest.raises(CacheBranchError, match="filled with branch_ids 0, now 1"):
            self.turn(model, torch.cat([answered, answered[:, :1]], dim=1), cache, thinking=True)

    def test_a_cache_of_a_dense_model_needs_a_branch(self, model, twins):
        prompt = collate([TEXT_ROWS[0]])["input_ids"]
        cache = DynamicCache(config=twins[1].config.get_text_config())
        said = self.turn(twins[1], prompt, cache)
        follow_up = torch.cat([said, said[:, :1]], dim=1)

        with pytest.raises(CacheBranchError, match="carries no branch"):
            self.turn(model, follow_up, cache)

    def test_a_manual_loop_stays_with_the_branch_of_its_cache(self, model, twins):
        def loop(network, inputs, **options):
            output, tokens = network(**inputs, use_cache=True, **options), []
            for _ in range(4):
                tokens.append(output.logits[:, -1:].argmax(-1))
                output = network(input_ids=tokens[-1], past_key_values=output.past_key_values)
            return torch.cat(tokens, dim=1)

        rows = [row(9, (1, 2, 4), seed=1), row(9, (1, 2, 4), seed=2)]
        inputs = collate(rows)
        del inputs["attention_mask"]  # stock Qwen2.5-VL: a manual loop with images and a 2-D mask crashes
        with torch.no_grad():
            mixed = loop(model, inputs, branch_ids=torch.tensor([1, 0]))

            assert torch.equal(mixed[0], loop(twins[1], inputs)[0])
            assert torch.equal(mixed[1], loop(twins[0], inputs)[1])

    def test_forward_refuses_another_branch_too(self, model):
        with torch.no_grad():
            output = model(**collate([TEXT_ROWS[0]]), use_cache=True, branch_ids=1)
            with pytest.raises(CacheBranchError):
                model(
                    input_ids=torch.tensor([[9]]), past_key_values=output.past_key_values, branch_ids=torch.tensor([0])
                )


class TestRefusals:
    @pytest.mark.parametrize(
        "options",
        [
            {"thinking": "sometimes"},
            {"thinking": 1},
            {"thinking": [True, False]},
            {"thinking": [1, 0, 0, 1]},
            {"branch_ids": 2},
            {"branch_ids": True},
            {"branch_ids": -1},
            {"branch_ids": torch.tensor([0, 1])},
            {"branch_ids": torch.tensor([0, 1, 2, 0])},
            {"branch_ids": torch.tensor([0.0, 1.0, 1.0, 0.0])},
            {"branch_ids": [0, 1, 1, 0]},
            {"router_threshold": 1.5},
            {"router_threshold": -0.1},
            {"router_threshold": float("nan")},
            {"router_threshold": "half"},
            {"thinking": True, "branch_ids": 1},
        ],
        ids=str,
    )
    def test_bad_routing_arguments(self, model, options):
        with pytest.raises(BranchError, match="found|for a batch of 4"):
            model.generate(**collate(TEXT_ROWS), max_new_tokens=1, **options)

    def test_a_misspelt_argument_is_still_caught(self, model):
        with pytest.raises(ValueError, match="brnch_ids"):
            model.generate(**collate(TEXT_ROWS), brnch_ids=1, max_new_tokens=1)

    def test_paged_caches_are_refused(self, model):
        with pytest.raises(UnsupportedError, match="generate_batch"):
            model.generate(**collate(TEXT_ROWS), cache_implementation="paged", max_new_tokens=1)


class TestContinuousBatching:
    PROMPTS = [item.ids for item in TEXT_ROWS[:2]]

    @pytest.mark.parametrize("thinking", [None, "auto", [True, False]])
    def test_it_is_refused_without_a_forced_branch(self, model, thinking):
        with pytest.raises(UnsupportedError, match="thinking=True"):
            model.generate_batch(self.PROMPTS, thinking=thinking)
        with pytest.raises(UnsupportedError, match="thinking=True"):
            model.init_continuous_batching(thinking=thinking)
        with pytest.raises(UnsupportedError, match="thinking=True"), model.continuous_batching_context_manager():
            pass

    @pytest.mark.parametrize("branch", [0, 1])
    def test_it_answers_like_the_dense_model_of_the_forced_branch(self, model, twins, branch):
        config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
        small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # else it fills the machine's memory
        options = {"continuous_batching_config": small, "progress_bar": False, "warmup": False}

        ours = copy.deepcopy(model).generate_batch(self.PROMPTS, config, thinking=bool(branch), **options)
        dense = copy.deepcopy(twins[branch]).generate_batch(self.PROMPTS, config, **options)

        tokens = [[list(result.generated_tokens) for result in results.values()] for results in (ours, dense)]
        assert tokens[0] == tokens[1]
        assert all(len(generated) == 5 for generated in tokens[0])
