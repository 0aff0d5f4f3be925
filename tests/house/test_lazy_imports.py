"""What starts without torch, and what works without the optional packages (design D13: newcomers, CI, laptops)."""

import pytest

from tests.house.import_rules import OPTIONAL
from tests.house.processes import REPOSITORY, run_python

HEAVY = ("torch", "transformers", "triton", "accelerate", "PIL")
REPORT = f"\nimport sys; print(' '.join(name for name in {HEAVY} if name in sys.modules) or 'nothing heavy')"

# Not to be found, as on a machine that does not have them.
BLOCK = f"""
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
def find_what_is_there(name, path=None, target=None):
    return None if name.partition(".")[0] in {sorted(OPTIONAL)} else find_spec(name, path, target)
PathFinder.find_spec = staticmethod(find_what_is_there)
"""


def metis_home_command(*arguments: str) -> str:
    run = (
        "try:\n    main(" + repr(list(arguments)) + ")\nexcept SystemExit as stop:\n    assert not stop.code, stop.code"
    )
    return f"from metis_home.cli import main\n{run}"


@pytest.mark.parametrize(
    "program",
    [
        "import metis_home",
        "import metis_home.convert",
        "from metis_home import Branch, MetisHomeError, SYSTEM_PROMPT",
        "from metis_home.convert import upcycle, split, verify",
        metis_home_command("--help"),
        metis_home_command("--version"),
        metis_home_command("convert", "--help"),
        metis_home_command("split", "--help"),
        metis_home_command("generate", "--help"),
    ],
)
def test_it_starts_without_torch(program: str) -> None:
    printed = run_python("-c", program + REPORT, cwd=REPOSITORY)

    assert printed.splitlines()[-1] == "nothing heavy"


@pytest.mark.parametrize(
    "program",
    [
        "from metis_home import MetisHomeForConditionalGeneration, MetisHomeConfig, MetisHomeRouter, ops",
        "from metis_home import MetisHomeProcessor",
        "import metis_home.chat, metis_home.media, metis_home.convert, metis_home.cli",
        "import torch\n"
        "from metis_home import MetisHomeConfig, ops\n"
        "x = torch.ones(2, 1, 8)\n"
        "experts = [torch.nn.Linear(8, 8).eval() for _ in range(2)]\n"
        "assert ops.branch_ffn(x, experts, torch.tensor([0, 1])).shape == x.shape",
    ],
)
def test_it_works_without_the_optional_packages(program: str) -> None:
    run_python("-c", BLOCK + program, cwd=REPOSITORY)


def test_an_optional_package_is_really_missing_there() -> None:
    check = "try:\n    import peft\nexcept ModuleNotFoundError:\n    print('missing')"

    assert run_python("-c", BLOCK + check, cwd=REPOSITORY).strip() == "missing"
