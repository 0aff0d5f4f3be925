"""The kernels are tested in Triton's interpreter, in a process of their own: `pytest tests/kernels`.

Triton decides whether to interpret when a kernel is decorated, so the switch has to be thrown before the first import
and holds for the whole process. In a run of more than this folder it would change what other tests see (a CPU that runs
the `triton` backend); there these tests skip.
"""

import os
import pathlib

import pytest
import torch

HERE = pathlib.Path(__file__).parent.resolve()


def pytest_configure(config: pytest.Config) -> None:
    paths = [pathlib.Path(str(argument).split("::")[0]).resolve() for argument in config.args]
    if all(path == HERE or HERE in path.parents for path in paths):
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _interpreted():
    from metis_home.kernels.interpreter import INTERPRETING

    if not INTERPRETING:
        pytest.skip("needs its own process: pytest tests/kernels")
    torch.manual_seed(17)


@pytest.fixture(params=["pointer", "tma"])
def form(request, monkeypatch) -> str:
    """Small blocks, in both forms of the kernels. (The shipped blocks would hide every border inside one tile.)"""
    monkeypatch.setenv("METIS_HOME_KERNEL_TABLE", str(HERE / f"small_blocks_{request.param}.json"))
    return request.param


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Small blocks, pointer form."""
    monkeypatch.setenv("METIS_HOME_KERNEL_TABLE", str(HERE / "small_blocks_pointer.json"))
