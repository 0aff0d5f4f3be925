"""Imports run one way (docs/decisions/0001-one-import-root.md), and the judge itself is judged on bad sources."""

from pathlib import Path

import pytest

from tests.house.import_rules import check_source, check_tree

REPOSITORY = Path(__file__).resolve().parents[2]
KNOWN = {
    *("metis_home", "metis_home.errors", "metis_home.modeling", "metis_home.configuration", "metis_home.ops"),
    *("metis_home.kernels.reference", "metis_home.convert", "metis_home.convert.plan", "metis_home.convert.verify"),
    *("metis_home.training", "metis_home.training.sft", "metis_home.cli", "metis_home.cli.answer"),
}


def breaches(source: str, module: str) -> list[str]:
    is_package = any(name.startswith(module + ".") for name in KNOWN)
    return [str(breach) for breach in check_source(source, module, "file.py", KNOWN, is_package=is_package)]


def test_no_file_of_the_repository_imports_the_wrong_way() -> None:
    found = check_tree(REPOSITORY)

    assert not found, "\n" + "\n".join(map(str, found))


def test_the_judge_sees_the_whole_tree() -> None:
    from tests.house.import_rules import _package_files

    modules = {module for _, (module, _) in _package_files(REPOSITORY)}

    assert {"metis_home", "metis_home.errors", "metis_home.cli"} <= modules
    assert any(module.startswith("metis_home.kernels.") for module in modules)
    assert any(module.startswith("metis_home.convert.") for module in modules)


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("metis_home.modeling", "from .training import sft", "model must not import training"),
        ("metis_home.modeling", "import metis_home.training.sft", "model must not import training"),
        ("metis_home.modeling", "from metis_home import training", "model must not import training"),
        ("metis_home.modeling", "from .kernels import reference", "model must not import kernels"),
        ("metis_home.modeling", "from .convert.plan import Plan", "model must not import convert"),
        ("metis_home.modeling", "from . import cli", "model must not import cli"),
        ("metis_home", "from .cli import main", "model must not import cli"),
        ("metis_home.modeling", "def f():\n    from .training import sft", "model must not import training"),
        ("metis_home.modeling", "import importlib\nimportlib.import_module('metis_home.training')", "import training"),
        ("metis_home.ops", "from .modeling import MetisHomeModel", "ops must not import model"),
        ("metis_home.kernels.ffn", "from ..ops import branch_ffn", "kernels must not import ops"),
        ("metis_home.kernels.ffn", "from ..modeling import MetisHomeModel", "kernels must not import model"),
        ("metis_home.kernels.ffn", "import transformers", "torch, triton and the standard library only"),
        ("metis_home.kernels.ffn", "import numpy as np", "torch, triton and the standard library only"),
        ("metis_home.convert.plan", "from ..modeling import MetisHomeModel", "convert must not import model"),
        ("metis_home.convert.plan", "from .. import Branch", "convert must not import model"),
        ("metis_home.convert.plan", "def f():\n    import torch", "convert works without torch"),
        ("metis_home.convert.plan", "from transformers import AutoConfig", "convert works without transformers"),
        ("metis_home.convert.plan", "from .verify import verify", "may load a model, at start"),
        ("metis_home.convert.verify", "import torch", "imports torch at start"),
        ("metis_home.training.sft", "from ..kernels import reference", "training must not import kernels"),
        ("metis_home.training.sft", "from ..cli import main", "training must not import cli"),
        ("metis_home.training.sft", "from metis_home.convert import upcycle", "training must not import convert"),
        ("metis_home.errors", "from .modeling import MetisHomeModel", "leaf must not import model"),
        ("metis_home.errors", "import torch", "standard library only"),
        ("metis_home.cli.answer", "from ..modeling import MetisHomeModel", "cli imports the model"),
        ("metis_home.cli.answer", "import torch", "cli imports torch at start"),
        ("metis_home.cli.answer", "from ..kernels import reference", "cli must not import kernels"),
        ("metis_home.cli.answer", "from .. import ops", "cli imports the model"),
        ("metis_home.link_bundle", "import safetensors", "standard library only at start"),
        ("metis_home.link_bundle", "def f():\n    from .modeling import X", "shared must not import model"),
        ("metis_home.router", "from .ops import route_queries", "parts must not import ops"),
        ("metis_home.router", "import transformers", "torch and the standard library only"),
        (
            "metis_home.modeling",
            "if not is_torchvision_available():\n    import torchvision",
            "torchvision is optional",
        ),
        ("metis_home.modeling", "import flash_attn", "flash_attn is optional"),
        ("metis_home.modeling", "import triton.language as tl", "triton is optional"),
        (
            "metis_home.modeling",
            "try:\n    import torchvision\nexcept ImportError:\n    pass",
            "torchvision is optional",
        ),
        ("metis_home.training.sft", "import peft", "peft is optional"),
        ("metis_home.training.sft", "class A:\n    import matplotlib", "matplotlib is optional"),
        ("test_something", "import kernels.reference", "write `metis_home.kernels.reference`"),
        ("test_something", "from convert import upcycle", "write `metis_home.convert`"),
        ("metis_home.modeling", "from training.sft import x", "write `metis_home.training.sft`"),
    ],
)
def test_an_import_that_runs_the_wrong_way_is_reported(module: str, source: str, rule: str) -> None:
    found = breaches(source, module)

    line = 1 + source[: source.rindex("import")].count("\n") if "importlib" not in source else 2
    assert len(found) == 1, found
    assert found[0].startswith(f"file.py:{line}: ")
    assert rule in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("metis_home.processing", "if is_torchvision_available():\n    import torchvision"),
        ("metis_home.ops", "from .router import MetisHomeRouter\nfrom .branch_plan import plan_branches"),
        ("metis_home.router", "import torch\nfrom .errors import BranchError"),
        (
            "metis_home.modeling",
            "import torch\nfrom transformers import AutoConfig\nfrom . import ops\nfrom .errors import X",
        ),
        ("metis_home.modeling", "def f():\n    import flash_attn"),
        ("metis_home.modeling", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torchvision"),
        ("metis_home.ops", "from .kernels import reference\nimport torch"),
        (
            "metis_home.kernels.ffn",
            "import triton\nimport torch\nimport math\nfrom .reference import f\nfrom ..errors import X",
        ),
        ("metis_home.convert.logits", "def f():\n    import torch\n    from ..modeling import X"),
        ("metis_home.link_bundle", "import json\nfrom .names import to_hub_name\ndef f():\n    import safetensors"),
        ("metis_home.convert", "from .verify import verify\nfrom .plan import Plan"),
        (
            "metis_home.convert.plan",
            "import safetensors\nfrom ..names import to_hub_name\nfrom ..config_fields import X",
        ),
        (
            "metis_home.convert.verify",
            "def f():\n    import torch\n    from .. import MetisHomeForConditionalGeneration",
        ),
        ("metis_home.training.sft", "import torch\nfrom .. import ops\nfrom ..modeling import X"),
        (
            "metis_home.cli.answer",
            "from ..convert import upcycle\ndef f():\n    from ..modeling import X\n    import torch",
        ),
        ("test_something", "import metis_home.kernels.reference\nimport torchvision"),
    ],
)
def test_an_import_that_runs_the_right_way_is_let_through(module: str, source: str) -> None:
    assert breaches(source, module) == []


def test_type_checkers_also_keep_the_direction() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .training import sft"

    assert breaches(source, "metis_home.modeling") == [
        "file.py:3: model must not import training (metis_home.training.sft); it may import leaf, model, ops, parts, shared"
    ]


def test_a_kernels_package_is_reported(tmp_path: Path) -> None:
    (tmp_path / "metis_home").mkdir()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    (tmp_path / "metis_home" / "kernels").symlink_to("../kernels")

    assert [breach.file for breach in check_tree(tmp_path)] == ["kernels/__init__.py"]
