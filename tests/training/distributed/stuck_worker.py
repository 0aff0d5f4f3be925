"""Two ranks that work together for two steps; then rank 1 does something else, and rank 0 waits for it."""

import ctypes
import sys
import time

import torch
import torch.distributed as dist

from metis_home.training.distributed import watchdog
from metis_home.training.distributed.watchdog import Watchdog

# How the stuck rank spends its time: in Python, or in C code that keeps the interpreter's lock.
WAYS = {
    "sleeps": lambda: time.sleep(600),
    "keeps_the_lock": lambda: ctypes.PyDLL(None).sleep(600),
}


def read_rows_for_ever(way: str) -> None:
    WAYS[way]()


def main() -> None:
    way = sys.argv[1]
    watchdog._ANSWER_SECONDS, watchdog._LAST_RESORT_SECONDS = 4.0, 5.0
    dist.init_process_group("gloo")
    dog = Watchdog.of_process_group(4.0, poll_seconds=0.2)
    for step in range(1, 4):
        dog.enter("micro-batch 1 of 1", step=step, rows=f"row-{2 * step + dist.get_rank()}")
        if step == 3 and dist.get_rank() == 1:
            dog.enter("reading rows", step=step)
            read_rows_for_ever(way)
        dist.all_reduce(torch.ones(1))
    dog.close()
    print(f"rank {dist.get_rank()} is done", flush=True)


if __name__ == "__main__":
    main()
