"""The distributed runs without what keeps ranks together, to see that their tests would notice.

Usage: broken_worker MODEL OUT ENGINE:BREAK:CASE ...   Each result or error of a rank goes to OUT/ENGINE-BREAK-rank.pt.
"""

import os
import sys
import time
from pathlib import Path

import torch

from metis_home import ops
from metis_home.training.distributed import watchdog
from metis_home.training.sft.dataset import RecordDataset
from metis_home.training.vision_presence import VisionPresence
from tests.training.distributed.cases import CASES
from tests.training.distributed.worker import train_case

INTACT = ops._calls_every_expert


def break_it(what: str, rank: int) -> None:
    ops._calls_every_expert = INTACT
    if what == "experts":  # a branch without rows is not called
        ops._calls_every_expert = lambda expert: False
    elif what == "vision":  # batches without images leave the vision tower out
        VisionPresence.is_needed = lambda self, batch: False
    elif what == "rows" and rank == 1:  # a disk that never answers
        RecordDataset.__getitem__ = wait_for_the_disk


def wait_for_the_disk(self, number: int) -> None:
    time.sleep(600)


def main() -> None:
    torch.set_num_threads(1)
    watchdog._ANSWER_SECONDS = 5.0
    model_dir, out, *jobs = sys.argv[1:]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for job in jobs:
        engine, what, case = job.split(":")
        break_it(what, rank)
        print(f"rank {rank}: {job}", flush=True)
        try:
            result = train_case(
                CASES[case], engine, model_dir, Path(out) / f"{engine}-{what}", world, watchdog_seconds=8
            )
        except RuntimeError as error:
            result = {"error": str(error)}
        torch.save(result, Path(out) / f"{engine}-{what}-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
