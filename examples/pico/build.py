"""Write a pico two-branch model and its data sets, for recipes and tries: a minute or less on one core.

    python examples/pico/build.py OUT [--steps N | --random]

OUT/model is a two-branch checkpoint (both branches the same dense model, the router new), OUT/dense the dense model it
was made from; OUT/data has train.jsonl (Stage-SFT: half thinking, half not), heldout.jsonl and the images.
"""

import argparse
import logging
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `pico` is a package of examples/

from pico.dense import DenseSettings, TowerSettings, train_dense, write_encoded, write_tower
from pico.families import Sizes, write_families

SIZES = Sizes(dense=600, sft=300, test=60, templates=10)


def build(out: Path, *, tower_steps: int, dense_steps: int) -> None:
    """Make OUT anew."""
    import torch

    from metis_home.convert import upcycle

    torch.set_num_threads(1)  # the matrices are tiny: more threads only wait for each other
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    families = partial / "families"
    write_families(families, SIZES)
    tower = TowerSettings(pictures=1000, steps=tower_steps)
    write_tower(partial / "tower", families / "dense.jsonl", tower)
    dense = DenseSettings(steps=dense_steps, warmup_steps=10)
    encoded = partial / "encoded.pt"
    write_encoded(encoded, partial / "tower", families / "dense.jsonl")
    train_dense(partial / "dense", partial / "tower", encoded, dense, seed=0)
    upcycle(partial / "dense", partial / "model", router_hidden_size=64)

    data = partial / "data"
    data.mkdir()
    for part, name in (("sft", "train"), ("test", "heldout"), ("dense", "dense")):
        shutil.copyfile(families / f"{part}.jsonl", data / f"{name}.jsonl")
    (families / "images").rename(data / "images")
    shutil.rmtree(families)
    shutil.rmtree(partial / "tower")
    encoded.unlink()
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a pico two-branch model and its data sets.")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make; one that is there is replaced")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="steps of the dense model (default: 60)")
    parser.add_argument(
        "--random", action="store_true", help="do not train: random weights, for tries of the machinery"
    )
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    steps = 0 if arguments.random else arguments.steps
    build(arguments.out, tower_steps=min(steps, 100), dense_steps=steps)
    print(f"{arguments.out}/model  {arguments.out}/data/train.jsonl  {arguments.out}/data/heldout.jsonl")
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    sys.exit(main())
