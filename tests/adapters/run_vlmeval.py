"""Run in the VLMEvalKit environment: run_vlmeval.py MODEL TASK SIDECAR [arguments of vlmeval's command line]."""

import importlib.util
import re
import sys
from pathlib import Path

import torch


def declare_torchvision_operators() -> object:
    """VLMEvalKit imports torchvision; its PyPI build needs CUDA's torch. Undeclared operators are all it misses here.

    The operators stay unusable (nothing of this test calls them); imports then work on a CPU machine.
    """
    source = Path(importlib.util.find_spec("torchvision").origin).parent / "_meta_registrations.py"  # type: ignore
    text = source.read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in {"nms", *re.findall(r'register_meta\("(\w+)"', text), *re.findall(r'"torchvision::(\w+)"', text)}:
        library.define(f"{name}(Tensor x) -> Tensor")
    return library  # must stay alive


def main() -> None:
    """Register the model and a data set that knows how to score itself, then hand over to the kit."""
    model, task, sidecar = sys.argv[1:4]
    sys.argv[1:4] = ["--data", task, "--model", "Metis-HOME-pico"]
    kept = declare_torchvision_operators()

    from vlmeval import dataset
    from vlmeval.smp import load

    from metis_home.training.evaluation.vlmeval import register, run

    class SmallTask(dataset.CustomVQADataset):
        @classmethod
        def supported_datasets(cls) -> list[str]:
            return [task]

        def evaluate(self, eval_file: str, **_: object) -> dict[str, float]:
            rows = load(eval_file)
            return {"accuracy": float((rows["prediction"].astype(str) == rows["answer"].astype(str)).mean())}

    dataset.DATASET_CLASSES.append(SmallTask)
    register("Metis-HOME-pico", model, max_new_tokens=12, device="cpu", route="think", router_log=sidecar)
    run()
    del kept


if __name__ == "__main__":
    main()
