"""`ServerEngine`: rollouts by vLLM servers, whose weights follow the policy.

    Prompt --ids with one token per image, images as PNG--> server --ids, log-probabilities, version--> Rollout
    policy --dense checkpoint of the branch (weight_export.py)--> directory that both can read --reload--> server

A two-branch model has one server, or several, per branch that answers: each branch is a dense Qwen2.5-VL. What comes
back is checked and not believed: the ids of the expanded prompt, one log-probability for each token, and that every token
was sampled by the weights that were sent last.
"""

import logging
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import xxhash
from torch import nn

from metis_home.branch import Branch
from metis_home.errors import EngineError

from .. import collectives
from .pixels import as_data_url, collapse_images, pictures
from .routing import divide
from .server_replies import Expected, read_reply
from .types import Prompt, Rollout, Sampling
from .vllm_client import ServerSettings, VLLMClient
from .weight_export import export_weights, exported_names, remove_other_versions

if TYPE_CHECKING:
    from metis_home.processing import MetisHomeProcessor

    from .hf import HFEngine

logger = logging.getLogger(__name__)

_NEVER = -1e9  # added to a logit; what is left of the token's probability is 0 in float32

Servers = Mapping[Branch | None, Sequence[str]]


class ServerEngine:
    """Samples from vLLM servers.

    Args:
        processor: of the model; tokenizer and image processor.
        servers: addresses; None stands for a dense model, a `Branch` for that branch of a two-branch model. Several
            addresses share the prompts.
        weights_dir: where `update_weights` writes; servers must see the same path. None: weights cannot be updated.
        weights_dtype: of the written weights; None: as they are trained.
        settings: time-outs, tries, concurrency.
        seed: of sampling.
        exact_logprobs: insist that log-probabilities are those of the whole distribution at the sampling temperature,
            which a policy is trained on. False where only the tokens count.
        router: an engine around the two-branch model, asked where its router sends or draws each prompt's branch.
    Raises:
        EngineError: no address, or the openai client is missing.
    """

    shares_weights = False

    def __init__(
        self,
        processor: "MetisHomeProcessor",
        servers: Servers,
        *,
        weights_dir: str | Path | None = None,
        weights_dtype: torch.dtype | None = None,
        settings: ServerSettings | None = None,
        seed: int = 0,
        exact_logprobs: bool = True,
        router: "HFEngine | None" = None,
    ) -> None:
        self.settings = settings or ServerSettings()
        self._clients = {
            branch: [VLLMClient(url, self.settings) for url in urls] for branch, urls in servers.items() if urls
        }
        if not self._clients:
            raise EngineError("there is no address of a server. Expected for example http://127.0.0.1:8000")
        self.processor, self.exact_logprobs, self.router = processor, exact_logprobs, router
        self.weights_dir = None if weights_dir is None else Path(weights_dir)
        self.weights_dtype = weights_dtype
        self._seed, self._calls = seed, 0
        self._run, self._version = "", 0
        self._labels: dict[Branch | None, str] = {}
        self._max_model_len: dict[str, int] = {}

    def generate(self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling) -> list[list[Rollout]]:
        """Answer each prompt `num_generations` times, see `RolloutEngine.generate`.

        Raises:
            EngineError: a server is down, slow, refuses, too short, or replies with something else than was asked.
        """
        call, self._calls = self._calls, self._calls + 1
        jobs = self._jobs(prompts, num_generations, sampling, call)
        for branch in dict.fromkeys(job.branch for job in jobs):
            self._check_servers(branch, sampling)
        answers: list[list[Rollout]] = [[] for _ in prompts]
        threads = ThreadPoolExecutor(max_workers=self.settings.concurrency, thread_name_prefix="rollouts")
        try:
            for job, rollouts in zip(jobs, threads.map(lambda job: self._answer(job, sampling), jobs), strict=True):
                answers[job.place] += rollouts
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
        return answers

    def update_weights(self, model: nn.Module) -> None:
        """Send the weights of `model` to every server. All ranks call it together; rank 0 writes and asks for the reload.

        The first time all weights, later only layers that train, unless a server has lost what it was sent.

        Raises:
            EngineError: on every rank, if the weights could not be written, read or loaded.
        """
        if self.weights_dir is None:
            raise EngineError("this engine has no weights_dir, so its servers keep the weights they were started with")
        self._run = self._run or collectives.gather(uuid.uuid4().hex[:8])[0]
        self._version += 1
        for branch in self._clients:
            only_trained = collectives.gather(self._servers_are_ours(branch))[0]
            if only_trained and not exported_names(model, branch, only_trained=True):
                continue  # nothing of this branch trains
            label = f"{self._run}-{self._version}"
            problem = None
            try:
                self._send(model, branch, label, only_trained=only_trained)
            except EngineError as error:
                problem = str(error)
            problems = [found for found in collectives.gather(problem) if found is not None]
            if problems:
                raise EngineError(problems[0])
            self._labels[branch] = label

    def seed(self, seed: int) -> None:
        """See `RolloutEngine.seed`."""
        self._seed, self._calls = seed, 0

    def state_dict(self) -> dict[str, object]:
        """The seed and how often it was used: every request's own seed follows from them."""
        return {"seed": self._seed, "calls": self._calls}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take up a state."""
        self._seed, self._calls = int(str(state["seed"])), int(str(state["calls"]))

    def close(self) -> None:
        """Close all connections."""
        for client in (client for clients in self._clients.values() for client in clients):
            client.close()

    # ---- rollouts ---------------------------------------------------------------------------------------------------

    def _jobs(self, prompts: Sequence[Prompt], count: int, sampling: Sampling, call: int) -> "list[_Job]":
        """One request per prompt and branch."""
        if not isinstance(sampling.branch, str):
            rows = [(place, sampling.branch, count, 0.0) for place in range(len(prompts))]
        else:
            rows = self._routed(prompts, count, sampling.branch, call)
        jobs = []
        for place, branch, number, logprob in rows:
            if branch not in self._clients:
                served = ", ".join("a dense model" if one is None else one.label for one in self._clients)
                raise EngineError(f"rollouts of branch {branch!r} are wanted, and there are servers for {served} only")
            clients = self._clients[branch]
            client = clients[(place + collectives.rank()) % len(clients)]
            seed = _seed_of(self._seed, call, place, branch)
            jobs.append(_Job(place, prompts[place], branch, number, logprob, client, seed))
        return jobs

    def _routed(
        self, prompts: Sequence[Prompt], count: int, wanted: str, call: int
    ) -> list[tuple[int, Branch | None, int, float]]:
        if self.router is None:
            raise EngineError(f"branch {wanted!r} asks the router, which servers do not have: give the engine `router`")
        shares = divide(
            self.router.router_logits(prompts),
            count,
            cast(Literal["router", "sample"], wanted),
            threshold=self.router.router_threshold(),
            generator=torch.Generator().manual_seed(_seed_of(self._seed, call, "router")),
        )
        return [(share.place, branch, share.count, share.logprob) for branch, rows in shares.items() for share in rows]

    def _answer(self, job: "_Job", sampling: Sampling) -> list[Rollout]:
        prompt, image_processor = job.prompt, self.processor.image_processor
        longest = len(prompt) + sampling.max_new_tokens
        if longest > self._max_model_len[job.client.url]:
            raise EngineError(
                f"prompt {prompt.id!r} has {len(prompt)} tokens, its answer at most {sampling.max_new_tokens}, and "
                f"{job.client.url} takes {self._max_model_len[job.client.url]} together: it would cut the answer. Start "
                f"it with --max-model-len {longest} or more."
            )
        asked = (
            job.count if sampling.temperature > 0 else 1
        )  # greedy answers are all the same, and n = 1 is all vLLM takes
        body: dict[str, object] = {
            "token_ids": collapse_images(prompt, self.processor.image_token_id, image_processor.merge_size),
            "sampling_params": _sampling_params(sampling, asked, job.seed),
            "return_token_ids": True,
        }
        images = pictures(prompt, image_processor)
        if images:
            body["content_parts"] = [{"type": "image_url", "url": as_data_url(image)} for image in images]
        expected = Expected(
            where=f"{job.client.url}, prompt {prompt.id!r}",
            prompt_ids=prompt.input_ids,
            count=asked,
            max_new_tokens=sampling.max_new_tokens,
            version=self._labels.get(job.branch),
        )
        answers = read_reply(job.client.generate(body), expected)
        return [
            Rollout(
                prompt=prompt,
                completion_ids=list(answer.ids),
                logprobs=list(answer.logprobs),
                loss_mask=[1] * len(answer.ids),
                branch=None if job.branch is None else int(job.branch),
                branch_logprob=job.branch_logprob,
                finished=answer.finished,
                text=self.processor.tokenizer.decode(answer.ids, skip_special_tokens=True),
            )
            for answer in answers * (job.count // asked)
        ]

    def _check_servers(self, branch: Branch | None, sampling: Sampling) -> None:
        """Once per server: how long it reads, and which log-probabilities it gives."""
        if self.exact_logprobs and (sampling.top_p < 1 or sampling.top_k):
            raise EngineError(
                f"a server's log-probabilities would be those of what top_p {sampling.top_p} and top_k {sampling.top_k} "
                "leave, and a policy is trained on the whole distribution. Set top_p 1 and top_k 0."
            )
        for client in self._clients[branch]:
            if client.url in self._max_model_len:
                continue
            length = client.max_model_len()
            if self.exact_logprobs and not _has_processed_logprobs(client):
                raise EngineError(
                    f"{client.url} returns log-probabilities of the raw logits, without temperature and suppressed "
                    "tokens. Start it with --logprobs-mode processed_logprobs."
                )
            self._max_model_len[client.url] = length

    # ---- weights ----------------------------------------------------------------------------------------------------

    def _servers_are_ours(self, branch: Branch | None) -> bool:
        """Does every server of this branch still have what it was sent last? Only rank 0 asks."""
        label = self._labels.get(branch)
        if label is None or collectives.rank() != 0:
            return False
        try:
            return all(client.weight_version() == label for client in self._clients[branch])
        except EngineError as error:
            logger.warning("all weights are sent again: %s", error)
            return False

    def _send(self, model: nn.Module, branch: Branch | None, label: str, *, only_trained: bool) -> None:
        assert self.weights_dir is not None
        root = self.weights_dir / ("dense" if branch is None else branch.label)
        exported = export_weights(
            model, root, version=self._version, branch=branch, dtype=self.weights_dtype, only_trained=only_trained
        )
        if exported is None:  # not rank 0
            return
        with ThreadPoolExecutor(max_workers=len(self._clients[branch])) as threads:
            seconds = list(
                threads.map(lambda client: client.load_weights(exported.folder, label), self._clients[branch])
            )
        remove_other_versions(root, exported.version)
        logger.info(
            "weights %s: %d tensors, %.1f MiB, loaded by %d servers in %.2f s",
            label,
            exported.tensors,
            exported.bytes / 2**20,
            len(seconds),
            max(seconds),
        )


@dataclass(frozen=True, slots=True)
class _Job:
    """One request."""

    place: int
    prompt: Prompt
    branch: Branch | None
    count: int
    branch_logprob: float
    client: VLLMClient
    seed: int


def _sampling_params(sampling: Sampling, count: int, seed: int) -> dict[str, object]:
    """vLLM's `SamplingParams`; nothing is left to the server's defaults."""
    return {
        "n": count,
        "seed": seed,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {str(token): _NEVER for token in sampling.suppress_token_ids} or None,
        "ignore_eos": True,  # ours are the stop tokens, whatever the server's generation config says
        "stop_token_ids": list(sampling.eos_token_ids),
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "detokenize": bool(sampling.stop),
        "logprobs": 0,  # of the sampled token, and no other
    }


def _seed_of(*parts: object) -> int:
    """Leaves room above: the server adds the answer's number to it."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode()) % (1 << 48)


def _has_processed_logprobs(client: VLLMClient) -> bool:
    """A token that is the only one allowed has probability 1, unless the server speaks of the raw logits."""
    params: dict[str, Any] = {"max_tokens": 1, "temperature": 1.0, "logprobs": 0, "allowed_token_ids": [0], "seed": 0}
    reply = client.generate({"token_ids": [0], "sampling_params": params | {"detokenize": False, "ignore_eos": True}})
    try:
        return abs(reply["choices"][0]["logprobs"]["content"][0]["logprob"]) < 1e-6
    except (KeyError, IndexError, TypeError) as error:
        raise EngineError(f"{client.url} replied without log-probabilities: {reply}") from error
