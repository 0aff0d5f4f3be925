"""The rollout engine of a run: the model itself, or servers."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from metis_home.branch import Branch

from ..rollouts.engine import RolloutEngine
from ..rollouts.hf import HFEngine
from ..rollouts.server import ServerEngine
from ..rollouts.vllm_client import ServerSettings
from .config import MetisRLConfig

if TYPE_CHECKING:
    from metis_home.processing import MetisHomeProcessor

_DTYPES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def make_engine(
    args: MetisRLConfig,
    model: nn.Module,
    processor: "MetisHomeProcessor",
    *,
    rank: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> RolloutEngine:
    """What generates, as the settings say.

    Args:
        model: unwrapped.
        rank: each rank draws its own random numbers.
        autocast: what the model runs in where it generates, or routes, in this process.
    """
    seed = args.seed * 1000 + rank
    own = HFEngine(
        model,
        processor.tokenizer,
        max_tokens=args.rollout_batch_tokens,
        seed=seed,
        autocast=autocast,
        device=args.device,
    )
    if args.engine == "hf":
        return own
    return ServerEngine(
        processor,
        servers_of(args),
        weights_dir=args.server_weights_dir or Path(str(args.output_dir)) / "server_weights",
        weights_dtype=_DTYPES[args.server_weights_dtype],
        settings=ServerSettings(timeout_seconds=args.server_timeout_seconds, concurrency=args.server_concurrency),
        seed=seed,
        router=own if isinstance(args.thinking, str) else None,
    )


def servers_of(args: MetisRLConfig) -> dict[Branch | None, list[str]]:
    """Which addresses serve which branch; None is a dense model."""
    if args.thinking is None:
        return {None: args.server_urls or []}
    return {Branch.THINKING: args.server_urls or [], Branch.NON_THINKING: args.server_urls_non_thinking or []}
