"""A server on the loopback address that speaks vLLM's endpoints and answers with a real tiny model.

It knows of a request only what came over HTTP: ids with one token per image, PNGs, sampling parameters. Weights are read
from the directories that it is told to load. `faults` says how it misbehaves.
"""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from metis_home.training.rollouts.hf import HFEngine
from metis_home.training.rollouts.types import Prompt, Sampling

Fault = Callable[[dict[str, Any]], dict[str, Any] | int | float | bytes]


class LocalServer:
    """The state of one server. `faults`: path -> what becomes of the next replies, one per request.

    A fault is given the reply and returns another one, a status, seconds to sleep before the reply, or raw bytes.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, processor: Any, max_model_len: int = 512) -> None:
        self.model, self.processor, self.max_model_len = model.eval(), processor, max_model_len
        self.version, self.is_paused, self.processed_logprobs = "default", False, True
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[str] = []
        self.loaded: list[set[str]] = []
        self.url = ""
        self._lock = threading.Lock()

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any] | int | None:
        """What a server without faults replies; None: an empty body; a number: a status."""
        name, _, query = path.partition("?")
        if name == "/v1/models":
            return {"data": [{"id": "tiny", "max_model_len": self.max_model_len}]}
        if name == "/weight_info":
            return {"weight_version": self.version}
        if name == "/inference/v1/generate":
            if body["sampling_params"].get("n", 1) > 1 and body["sampling_params"]["temperature"] == 0:
                return 400  # as vLLM
            with self._lock:
                return self.generate(body)
        if name == "/collective_rpc":
            assert self.is_paused, "weights were replaced while requests ran"
            assert body["method"] == "reload_weights"
            self.load(Path(body["kwargs"]["weights_path"]))
            return {"results": [None]}
        if name == "/update_weight_version":
            self.version = body["new_version"]
            return {"success": True}
        if name in ("/pause", "/resume"):
            assert name == "/resume" or query == "mode=wait"
            self.is_paused = name == "/pause"
            return {"status": name[1:]}
        if name == "/reset_prefix_cache":
            return {"success": True}
        assert name in ("/reset_mm_cache", "/reset_encoder_cache")
        return None

    def load(self, folder: Path) -> None:
        """Take over what is in a directory, which may be a part of the weights."""
        read = {
            name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
        }
        self.loaded.append(set(read))
        own = self.model.state_dict()
        for name, tensor in read.items():
            module = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
            own[module.replace("visual.", "model.visual.", 1) if name.startswith("visual.") else module].copy_(tensor)

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """Sample as asked."""
        params = body["sampling_params"]
        prompt = self._prompt(body)
        forbidden = tuple(int(token) for token, bias in (params.get("logit_bias") or {}).items() if bias <= -100)
        if allowed := params.get("allowed_token_ids"):
            vocabulary = self.model.config.text_config.vocab_size
            forbidden += tuple(token for token in range(vocabulary) if token not in allowed)
        sampling = Sampling(
            max_new_tokens=min(params["max_tokens"], self.max_model_len - len(prompt)),
            temperature=params["temperature"],
            suppress_token_ids=forbidden if self.processed_logprobs else (),
            eos_token_ids=tuple(params.get("stop_token_ids", ())),
            stop=tuple(params.get("stop", ())),
        )
        choices = []
        for index in range(params.get("n", 1)):
            engine = HFEngine(self.model, self.processor.tokenizer, seed=params["seed"] + index)
            [[rollout]] = engine.generate([prompt], 1, sampling)
            pairs = zip(rollout.completion_ids, rollout.logprobs, strict=True)
            choices.append(
                {
                    "index": index,
                    "finish_reason": "stop" if rollout.finished else "length",
                    "token_ids": rollout.completion_ids,
                    "logprobs": {"content": [{"token_id": token, "logprob": value} for token, value in pairs]},
                    "weight_versions": [{"version": self.version, "start": 0, "end": len(rollout.completion_ids)}],
                }
            )
        return {"prompt_token_ids": prompt.input_ids, "choices": choices[::-1]}  # clients must not trust the order

    def _prompt(self, body: dict[str, Any]) -> Prompt:
        parts = body.get("content_parts") or []
        urls = [part["url"].removeprefix("data:image/png;base64,") for part in parts]
        images = [Image.open(io.BytesIO(base64.b64decode(url))) for url in urls]
        image_processor, image_token = self.processor.image_processor, self.processor.image_token_id
        vision = image_processor(images, return_tensors="pt") if images else {}
        grids = vision["image_grid_thw"].tolist() if images else []
        lengths = iter(t * h * w // image_processor.merge_size**2 for t, h, w in grids)
        ids: list[int] = []
        for token in body["token_ids"]:
            ids += [token] * next(lengths) if token == image_token else [token]
        return Prompt(
            index=0,
            id="?",
            input_ids=ids,
            mm_token_type_ids=[int(token == image_token) for token in ids],
            pixel_values=vision.get("pixel_values"),
            image_grid_thw=vision.get("image_grid_thw"),
        )


@contextmanager
def running(server: LocalServer) -> Iterator[LocalServer]:
    """Serve on a free port while it lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

        def _answer(self, body: dict[str, Any]) -> None:
            server.requests.append((self.path, body))
            server.headers.append(self.headers.get("Authorization", ""))
            waiting = server.faults.get(self.path.partition("?")[0], [])
            outcome: Any = server.reply(self.path, body)
            if waiting:
                outcome = waiting.pop(0)(outcome)
            if isinstance(outcome, float):
                time.sleep(outcome)
                outcome = {}
            if isinstance(outcome, int):
                self._send(outcome, b'{"error": {"message": "as ordered"}}')
            elif isinstance(outcome, bytes):
                self._send(200, outcome)
            else:
                self._send(200, b"" if outcome is None else json.dumps(outcome).encode())

        def _send(self, status: int, content: bytes) -> None:
            try:
                self.send_response(status)
                if content:
                    self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except ConnectionError:
                pass  # the client gave up waiting

        def log_message(self, *arguments: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def twin(model: Any) -> Any:
    """Another model of the same configuration, with other weights."""
    torch.manual_seed(99)
    return type(model)(model.config)
