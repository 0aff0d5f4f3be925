"""The server engine against a server on the loopback address, and against the HF engine: the same tokens, or an error."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metis_home.branch import Branch
from metis_home.errors import EngineError
from metis_home.training.data.encode import Encoder
from metis_home.training.data.records import load_records
from metis_home.training.rollouts.engine import RolloutEngine
from metis_home.training.rollouts.hf import HFEngine
from metis_home.training.rollouts.server import ServerEngine
from metis_home.training.rollouts.types import Prompt, Sampling, make_prompt
from metis_home.training.rollouts.vllm_client import ServerSettings
from metis_home.training.rollouts.vocabulary import end_token_ids, unsampled_token_ids
from tests.training.rl.pico_rl import dense, picture, processor, two_branch
from tests.training.rollouts.local_server import LocalServer, running, twin

PROCESSOR = processor()
QUICK = ServerSettings(timeout_seconds=120, tries=3, backoff_seconds=0.01, concurrency=4)


def prompts() -> list[Prompt]:
    """No image, one, and two of different sizes."""
    blocks = [{"type": "image", "image": picture(1)}, {"type": "image", "image": picture(2).resize((84, 28))}]
    rows = [
        {"prompt": "What??", "answer": "1"},
        {"prompt": "And here?", "image": picture(3), "answer": "1"},
        {"messages": [{"role": "user", "content": [*blocks, {"type": "text", "text": "Both?"}]}], "answer": "1"},
    ]
    encoder = Encoder(PROCESSOR, system_prompt=None)
    return [make_prompt(record, encoder, index=record.index) for record in load_records(rows)]


PROMPTS = prompts()


def sampling(model: Any, **fields: Any) -> Sampling:
    defaults: dict[str, Any] = {
        "max_new_tokens": 6,
        "temperature": 0.0,
        "eos_token_ids": end_token_ids(PROCESSOR.tokenizer),
        "suppress_token_ids": unsampled_token_ids(model.config, PROCESSOR.tokenizer),
    }
    return Sampling(**{**defaults, **fields})


@pytest.fixture(scope="module")
def model() -> Any:
    return dense()


@pytest.fixture
def server(model: Any) -> Iterator[LocalServer]:
    with running(LocalServer(model, PROCESSOR)) as one:
        yield one


def engine(server: LocalServer, **fields: Any) -> ServerEngine:
    return ServerEngine(PROCESSOR, {None: [server.url]}, **{"settings": QUICK, **fields})


def bodies(server: LocalServer) -> list[dict[str, Any]]:
    """What was asked to be sampled, without the question about log-probabilities."""
    return [body for path, body in server.requests if "generate" in path and body["token_ids"] != [0]]


def test_greedy_rollouts_are_those_of_the_hf_engine(model, server) -> None:
    ours = engine(server)

    groups = ours.generate(PROMPTS, 2, sampling(model))

    expected = HFEngine(model, PROCESSOR.tokenizer).generate(PROMPTS, 2, sampling(model))
    for group, wanted in zip(groups, expected, strict=True):
        assert [(r.completion_ids, r.text, r.finished) for r in group] == [
            (r.completion_ids, r.text, r.finished) for r in wanted
        ]
        torch.testing.assert_close(group[0].logprobs, wanted[0].logprobs, atol=1e-4, rtol=0)
    assert isinstance(ours, RolloutEngine)
    assert not ours.shares_weights


def test_one_image_token_per_image_is_sent_and_no_text(model, server) -> None:
    engine(server).generate(PROMPTS, 1, sampling(model))

    image = PROCESSOR.image_token_id
    sent = sorted((body["token_ids"].count(image), len(body.get("content_parts", []))) for body in bodies(server))
    assert sent == [(0, 0), (1, 1), (2, 2)]
    assert PROMPTS[2].input_ids.count(image) > 2
    assert all("prompt" not in body and "messages" not in body for body in bodies(server))


def test_sampling_follows_the_seed_and_a_state_goes_on_where_it_was(model, server) -> None:
    warm = sampling(model, temperature=1.0)

    def ids(one: ServerEngine) -> list[list[list[int]]]:
        return [[rollout.completion_ids for rollout in group] for group in one.generate(PROMPTS[:2], 3, warm)]

    first = engine(server, seed=5)
    once, state = ids(first), first.state_dict()
    again = ids(first)
    other = engine(server, seed=1)
    other.load_state_dict(state)

    assert len({tuple(answer) for group in once for answer in group}) == 6, "answers of one prompt share a seed"
    assert ids(engine(server, seed=5)) == once != again
    assert ids(other) == again
    other.seed(5)
    assert ids(other) == once
    assert ids(engine(server, seed=6)) != once


def test_log_probabilities_are_of_the_temperature_and_leave_out_image_tokens(model, server) -> None:
    image = PROCESSOR.image_token_id
    with torch.no_grad():
        was = model.lm_head.weight[image].clone()
        model.lm_head.weight[image] = 50 * torch.ones(model.config.text_config.hidden_size)  # some logits: +, some: -
    settings = sampling(model, temperature=0.5, max_new_tokens=4)

    [group] = engine(server).generate(PROMPTS[:1], 4, settings)

    for rollout in group:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        logits = model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1].float() / 0.5
        logits[:, list(settings.suppress_token_ids)] = -torch.inf
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), wanted, atol=1e-4, rtol=0)
    with torch.no_grad():
        model.lm_head.weight[image] = was


def test_a_server_with_raw_log_probabilities_is_refused_unless_only_tokens_count(model, server) -> None:
    server.processed_logprobs = False

    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        engine(server).generate(PROMPTS[:1], 1, sampling(model))
    assert engine(server, exact_logprobs=False).generate(PROMPTS[:1], 1, sampling(model))


def test_a_limited_distribution_is_refused_unless_only_tokens_count(model, server) -> None:
    limited = sampling(model, temperature=1.0, top_p=0.9)

    with pytest.raises(EngineError, match="top_p 1"):
        engine(server).generate(PROMPTS[:1], 1, limited)
    engine(server, exact_logprobs=False).generate(PROMPTS[:1], 1, limited)
    assert bodies(server)[-1]["sampling_params"]["top_p"] == 0.9


def test_every_setting_that_a_server_has_a_default_for_is_sent(model, server) -> None:
    engine(server).generate(PROMPTS[:1], 2, sampling(model, stop=("</tool_call>",)))

    sent = bodies(server)[0]["sampling_params"]
    assert sent["repetition_penalty"] == 1
    assert sent["ignore_eos"] is True
    assert sent["stop_token_ids"] == list(end_token_ids(PROCESSOR.tokenizer))
    assert sent["stop"] == ["</tool_call>"]
    assert sent["detokenize"] is True
    assert set(map(int, sent["logit_bias"])) == set(sampling(model).suppress_token_ids)


def drop_a_token(reply: dict) -> dict:
    reply["choices"][0]["token_ids"] = reply["choices"][0]["token_ids"][:-1]
    return reply


def another_token(reply: dict) -> dict:
    reply["choices"][0]["token_ids"][0] += 1
    return reply


def change(**fields: Any) -> Callable[[dict], dict]:
    def fault(reply: dict) -> dict:
        for choice in reply["choices"]:
            choice.update(fields)
        return reply

    return fault


def too_likely(reply: dict) -> dict:
    reply["choices"][0]["logprobs"]["content"][0]["logprob"] = 0.5
    return reply


def no_number(reply: dict) -> dict:
    reply["choices"][0]["logprobs"]["content"][0]["logprob"] = math.nan
    return reply


FAULTS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "other prompt ids": (
        lambda reply: {**reply, "prompt_token_ids": [5, *reply["prompt_token_ids"][1:]]},
        "at token 0",
    ),
    "longer prompt": (lambda reply: {**reply, "prompt_token_ids": [*reply["prompt_token_ids"], 5]}, "image processor"),
    "no prompt ids": (lambda reply: {"choices": reply["choices"]}, "prompt_token_ids"),
    "an answer too few": (lambda reply: {**reply, "choices": reply["choices"][:1]}, "2 answers were asked"),
    "the same answer twice": (lambda reply: {**reply, "choices": reply["choices"][:1] * 2}, "numbered"),
    "a token too few": (drop_a_token, "tokens and 6 log-prob"),
    "log-probabilities of other tokens": (another_token, "same token for each"),
    "no log-probabilities": (change(logprobs=None), "without log-prob"),
    "empty answer": (change(token_ids=[], logprobs={"content": []}), "at least one"),
    "above certainty": (too_likely, "is 0.5"),
    "not a number": (no_number, "is nan"),
    "aborted": (change(finish_reason="abort"), "'abort'"),
    "not JSON": (lambda reply: b"{half", "JSON"),
    "a list": (lambda reply: b"[1]", "JSON object"),
    "refused": (lambda reply: 400, "refused: status 400"),
    "not allowed": (lambda reply: 403, "--enable-scale-out"),
    "no such path": (lambda reply: 404, "--enable-scale-out"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_reply_is_an_error_that_says_what_was_wrong(fault: str, model, server) -> None:
    one, settings = engine(server), sampling(model, temperature=1.0, eos_token_ids=())
    one.generate(PROMPTS[:1], 2, settings)
    broken, message = FAULTS[fault]
    server.faults["/inference/v1/generate"] = [broken]

    with pytest.raises(EngineError, match=message):
        one.generate(PROMPTS[:1], 2, settings)
    assert not server.faults["/inference/v1/generate"], "it was not asked"


@pytest.mark.parametrize("trouble", [500, 503, 429], ids=str)
def test_passing_trouble_is_waited_out_with_the_same_result(trouble: int, model, server) -> None:
    expected = engine(server).generate(PROMPTS[1:2], 1, sampling(model, temperature=1.0))
    server.faults["/inference/v1/generate"] = [lambda reply: reply, lambda reply: trouble, lambda reply: trouble]

    found = engine(server).generate(PROMPTS[1:2], 1, sampling(model, temperature=1.0))

    assert found[0][0].completion_ids == expected[0][0].completion_ids
    assert not server.faults["/inference/v1/generate"]


def test_lasting_trouble_is_an_error_after_the_last_try(model, server) -> None:
    one = engine(server)
    one.generate(PROMPTS[:1], 1, sampling(model))
    server.faults["/inference/v1/generate"] = [lambda reply: 500] * 3

    with pytest.raises(EngineError, match="failed 3 times, at last with status 500"):
        one.generate(PROMPTS[:1], 1, sampling(model))


def test_a_server_that_does_not_answer_in_time_is_an_error(model, server) -> None:
    patient = engine(server)
    patient.generate(PROMPTS[:1], 1, sampling(model))
    hasty = engine(server, settings=replace(QUICK, timeout_seconds=0.4, tries=2))
    server.faults["/inference/v1/generate"] = [lambda reply: 2.0] * 2

    with pytest.raises(EngineError, match="Timeout"):
        hasty.generate(PROMPTS[:1], 1, sampling(model))


def test_no_server_at_all_is_an_error(model) -> None:
    nobody = ServerEngine(PROCESSOR, {None: ["http://127.0.0.1:9"]}, settings=QUICK)

    with pytest.raises(EngineError, match="Is the server up"):
        nobody.generate(PROMPTS[:1], 1, sampling(model))
    with pytest.raises(EngineError, match="http://HOST:PORT"):
        ServerEngine(PROCESSOR, {None: ["localhost:8000"]})
    with pytest.raises(EngineError, match="no address"):
        ServerEngine(PROCESSOR, {None: []})


def test_a_server_that_would_cut_answers_is_an_error(model, server) -> None:
    server.max_model_len = len(PROMPTS[0]) + 5

    with pytest.raises(EngineError, match=f"--max-model-len {len(PROMPTS[0]) + 6}"):
        engine(server).generate(PROMPTS[:1], 1, sampling(model))


def test_the_key_is_sent(model, server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")

    engine(server).generate(PROMPTS[:1], 1, sampling(model))

    assert set(server.headers) == {"Bearer secret"}


def test_several_servers_share_the_prompts(model, server) -> None:
    with running(LocalServer(model, PROCESSOR)) as second:
        both = ServerEngine(PROCESSOR, {None: [server.url + "/v1/", second.url]}, settings=QUICK)
        groups = both.generate(PROMPTS[:2], 1, sampling(model))

        assert len(bodies(server)) == len(bodies(second)) == 1
    assert [group[0].prompt.id for group in groups] == [prompt.id for prompt in PROMPTS[:2]]


def test_no_prompts_are_no_rollouts(model, server) -> None:
    assert engine(server).generate([], 4, sampling(model)) == []
    assert not server.requests


# ---- weights


def test_the_server_follows_the_policy(model, tmp_path: Path) -> None:
    policy = dense(seed=3)
    with running(LocalServer(twin(model), PROCESSOR)) as server:
        one = engine(server, weights_dir=tmp_path)
        before = one.generate(PROMPTS, 1, sampling(policy))
        one.update_weights(policy)
        after = one.generate(PROMPTS, 1, sampling(policy))

        expected = HFEngine(policy, PROCESSOR.tokenizer).generate(PROMPTS, 1, sampling(policy))
        assert [group[0].completion_ids for group in after] == [group[0].completion_ids for group in expected]
        assert [group[0].completion_ids for group in before] != [group[0].completion_ids for group in expected]
        names = [path for path, _ in server.requests if "generate" not in path and path != "/v1/models"]
        assert names == [
            *("/pause?mode=wait", "/collective_rpc", "/reset_mm_cache", "/reset_encoder_cache", "/reset_prefix_cache"),
            *("/update_weight_version", "/resume", "/weight_info"),
        ]


def test_later_only_whole_layers_that_train_are_sent(model, tmp_path: Path) -> None:
    policy = dense(seed=3)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("layers.1.mlp.gate_proj" in name)
    with running(LocalServer(twin(model), PROCESSOR)) as server:
        one = engine(server, weights_dir=tmp_path)
        one.update_weights(policy)
        with torch.no_grad():
            policy.model.language_model.layers[1].mlp.gate_proj.weight.add_(0.5)
        one.update_weights(policy)

        assert server.loaded[0] > server.loaded[1]
        layer = {name for name in server.loaded[0] if name.startswith("model.layers.1.")}
        assert server.loaded[1] == layer
        assert len(layer) == 12
        found = one.generate(PROMPTS, 1, sampling(policy))
        expected = HFEngine(policy, PROCESSOR.tokenizer).generate(PROMPTS, 1, sampling(policy))
        assert [group[0].completion_ids for group in found] == [group[0].completion_ids for group in expected]
        assert [folder.name for folder in (tmp_path / "dense").iterdir()] == ["v000002"]


def test_a_server_that_was_restarted_is_noticed_and_gets_all_weights_again(model, tmp_path: Path) -> None:
    policy = dense(seed=3)
    for parameter in policy.model.visual.parameters():
        parameter.requires_grad_(False)
    with running(LocalServer(twin(model), PROCESSOR)) as server:
        one = engine(server, weights_dir=tmp_path)
        one.update_weights(policy)
        server.version = "default"

        with pytest.raises(EngineError, match=r"\['default'\].*Was the server restarted"):
            one.generate(PROMPTS[:1], 1, sampling(policy))
        one.update_weights(policy)
        one.generate(PROMPTS[:1], 1, sampling(policy))
        one.update_weights(policy)

        assert server.loaded[1] == server.loaded[0] > server.loaded[2]


@pytest.mark.parametrize(
    ("path", "fault", "message"),
    [
        ("/collective_rpc", lambda reply: 400, "refused: status 400"),
        ("/collective_rpc", lambda reply: 404, "VLLM_SERVER_DEV_MODE=1"),
        ("/reset_prefix_cache", lambda reply: {"success": False}, "prefix cache cannot be emptied"),
        ("/weight_info", lambda reply: {"weight_version": "theirs"}, "Do two trainers share it"),
        ("/weight_info", lambda reply: {}, "does not say weight_version"),
    ],
)
def test_weights_that_did_not_arrive_are_an_error_and_the_server_goes_on(
    path: str, fault: Any, message: str, model, tmp_path: Path
) -> None:
    with running(LocalServer(twin(model), PROCESSOR)) as server:
        server.faults[path] = [fault]

        with pytest.raises(EngineError, match=message):
            engine(server, weights_dir=tmp_path).update_weights(model)
        assert not server.is_paused


def test_an_engine_without_a_directory_keeps_the_servers_weights(model, server) -> None:
    with pytest.raises(EngineError, match="weights_dir"):
        engine(server).update_weights(model)


# ---- two branches


@pytest.fixture
def branch_servers(tmp_path: Path) -> Iterator[tuple[Any, ServerEngine, dict[Branch, LocalServer]]]:
    policy = two_branch(seed=4)
    with running(LocalServer(dense(seed=8), PROCESSOR)) as slow, running(LocalServer(dense(seed=9), PROCESSOR)) as fast:
        servers = {Branch.THINKING: slow, Branch.NON_THINKING: fast}
        made = ServerEngine(
            PROCESSOR,
            {branch: [server.url] for branch, server in servers.items()},
            weights_dir=tmp_path,
            settings=QUICK,
            router=HFEngine(policy, PROCESSOR.tokenizer),
        )
        made.update_weights(policy)
        yield policy, made, servers


@pytest.mark.parametrize("branch", list(Branch))
def test_each_branch_answers_from_its_own_server(branch: Branch, branch_servers) -> None:
    policy, made, servers = branch_servers
    settings = sampling(policy, branch=branch)

    groups = made.generate(PROMPTS, 2, settings)

    expected = HFEngine(policy, PROCESSOR.tokenizer).generate(PROMPTS, 2, settings)
    for group, wanted in zip(groups, expected, strict=True):
        assert [(r.branch, r.completion_ids) for r in group] == [(r.branch, r.completion_ids) for r in wanted]
    assert len(bodies(servers[branch])) == 3
    assert not bodies(servers[Branch(1 - branch)])


def test_the_router_sends_prompts_as_with_the_hf_engine(branch_servers) -> None:
    policy, made, _ = branch_servers
    settings = sampling(policy, branch="router")

    groups = made.generate(prompts(), 2, settings)

    expected = HFEngine(policy, PROCESSOR.tokenizer).generate(PROMPTS, 2, settings)
    assert [[r.branch for r in group] for group in groups] == [[r.branch for r in group] for group in expected]


def test_drawn_branches_bring_their_log_probability(branch_servers) -> None:
    policy, made, _ = branch_servers

    groups = made.generate(PROMPTS, 8, sampling(policy, branch="sample", max_new_tokens=1))

    logits = HFEngine(policy, PROCESSOR.tokenizer).router_logits(PROMPTS).log_softmax(-1)
    assert {rollout.branch for group in groups for rollout in group} == {0, 1}
    for place, group in enumerate(groups):
        assert [r.branch_logprob for r in group] == [pytest.approx(float(logits[place, r.branch])) for r in group]


def test_only_the_branch_that_trains_is_sent_again(branch_servers) -> None:
    policy, made, servers = branch_servers
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(".experts.1." in name)

    made.update_weights(policy)

    assert len(servers[Branch.THINKING].loaded) == 2
    assert len(servers[Branch.NON_THINKING].loaded) == 1
    made.generate(PROMPTS[:1], 1, sampling(policy, branch=Branch.NON_THINKING))


def test_a_branch_without_a_server_is_an_error(server) -> None:
    policy = two_branch()
    one = ServerEngine(PROCESSOR, {Branch.THINKING: [server.url]}, settings=QUICK)

    with pytest.raises(EngineError, match="servers for thinking only"):
        one.generate(PROMPTS[:1], 1, sampling(policy, branch=Branch.NON_THINKING))
    with pytest.raises(EngineError, match="router"):
        one.generate(PROMPTS[:1], 1, sampling(policy, branch="router"))
