"""Which file may import what: the house's directions, read from the syntax trees.

    cli -> convert, training, model          training -> model, ops          convert -> leaves (verify*, logits*: model)
    training/pipeline (whole recipes) -> training, convert
    model -> ops -> kernels -> torch, triton         ops, model -> parts -> torch        leaves -> the standard library

*Leaves* are the small files everybody shares (errors, names, ...). *Parts* are what `ops` and the model both speak of
(the router, the plan of a batch). *Model* is every other file of `metis_home/`.
`check_source` judges one file and `check_tree` a repository; both return `Breach`es and raise nothing.
"""

import ast
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = "metis_home"
LINKED = ("kernels", "training", "convert")  # top-level folders that Python sees below metis_home
LEAVES = {"errors", "lazy", "branch", "names", "router_layout", "config_fields", "prompts", "responses"}
# Leaves that the converter shares with the model: the standard library at import time, more inside functions.
SHARED = {"link_bundle"}
PARTS = {"router", "branch_plan"}

# layer -> the layers it may import from, itself included
ALLOWED = {
    "leaf": {"leaf"},
    "shared": {"shared", "leaf"},
    "kernels": {"kernels", "leaf"},
    "parts": {"parts", "leaf"},
    "ops": {"ops", "kernels", "parts", "leaf"},
    "model": {"model", "ops", "parts", "shared", "leaf"},
    "convert": {"convert", "shared", "leaf"},
    "verify": {"verify", "convert", "model", "parts", "shared", "leaf"},
    "training": {"training", "model", "ops", "parts", "shared", "leaf"},
    "pipeline": {"pipeline", "convert", "training", "model", "ops", "parts", "shared", "leaf"},
    "cli": {"cli", "convert", "verify", "pipeline", "training", "model", "ops", "parts", "shared", "leaf"},
}
# `verify` is part of convert to everyone else: convert/__init__ offers it, the others may call it.
ALLOWED["convert"].add("verify")

TORCH = {"torch", "transformers", "accelerate"}
OPTIONAL = {
    *(
        "triton",
        "triton_kernels",
        "flash_attn",
        "deepspeed",
        "torchvision",
        "torchaudio",
        "qwen_vl_utils",
        "trl",
        "peft",
    ),
    *("matplotlib", "datasets", "math_verify", "vllm", "gguf", "liger_kernel", "tensorboard", "wandb", "cv2", "av"),
    *("sklearn", "scipy", "openai", "bm25s", "pyarrow", "pandas", "pydantic", "lmms_eval", "vlmeval"),
}


@dataclass(frozen=True, slots=True)
class Breach:
    """One import that runs the wrong way."""

    file: str
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}"


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module, by its absolute name, and whether it is always imported together with the file.

    Not at import time: inside a function, under `TYPE_CHECKING`, or behind a test such as `is_torchvision_available()`.
    """

    module: str
    line: int
    at_import_time: bool


def layer_of(module: str) -> str | None:
    """The layer of a module of ours, or None for everybody else's."""
    root, _, rest = module.partition(".")
    if root != ROOT:
        return None
    first = rest.split(".")[0]
    if first in LEAVES:
        return "leaf"
    if first in SHARED:
        return "shared"
    if first in PARTS:
        return "parts"
    if first == "convert" and rest.split(".")[-1].startswith(("verify", "logits")):
        return "verify"
    if rest.startswith("training.pipeline"):
        return "pipeline"
    if first in {"kernels", "training", "convert", "cli", "ops"}:
        return first
    return "model"


def check_source(source: str, module: str, file: str, known: set[str], *, is_package: bool = False) -> list[Breach]:
    """Judge one file.

    Args:
        source: its text.
        module: its absolute name, for example `metis_home.convert.plan`; anything outside `metis_home` (a test, an
            example) is only held to the rule about bare folder names.
        file: what a breach calls it.
        known: all modules of ours; tells `from . import ops` (a module) from `from . import Branch` (a name).
        is_package: the file is an `__init__.py`.
    """
    breaches = []
    for found in _imports(ast.parse(source, file), module, known, is_package):
        for rule in _broken_rules(found, module):
            breach = Breach(file, found.line, rule)
            if breach not in breaches:
                breaches.append(breach)
    return breaches


def check_tree(root: Path) -> list[Breach]:
    """Judge every Python file of a repository: the package, and tests, benchmarks and examples beside it."""
    files = dict(_package_files(root))
    known = {name for name, _ in files.values()}
    breaches = []
    for path, (module, is_package) in sorted(files.items()):
        breaches += check_source(path.read_text(), module, _label(path, root), known, is_package=is_package)
    for folder in ("tests", "benchmarks", "examples"):
        for path in sorted((root / folder).rglob("*.py")):
            breaches += check_source(path.read_text(), path.stem, _label(path, root), known)
    if (root / "kernels" / "__init__.py").exists():
        breaches.append(Breach("kernels/__init__.py", 1, "must not exist: it would shadow Hugging Face's `kernels`"))
    return breaches


def _broken_rules(found: Import, module: str) -> Iterator[str]:
    top = found.module.partition(".")[0]
    if top in LINKED:
        yield f"`{top}` is not a package of ours at top level: write `{ROOT}.{found.module}`"
        return
    layer, target = layer_of(module), layer_of(found.module)
    if layer is None:
        return
    if target is not None:
        if target not in ALLOWED[layer]:
            yield f"{layer} must not import {target} ({found.module}); it may import {_listed(ALLOWED[layer])}"
        elif layer == "cli" and target in {"model", "parts", "ops"} and found.at_import_time:
            yield f"cli imports the model ({found.module}) at start: move it into the command, `--help` needs no torch"
        elif layer == "convert" and target == "verify" and found.at_import_time and not _is_door(module):
            yield f"convert imports {found.module}, which may load a model, at start: move it into the function"
        return
    if layer == "shared" and found.at_import_time and top not in sys.stdlib_module_names:
        yield f"{module} imports the standard library only at start: move {top} into the function"
    if layer == "leaf" and top not in sys.stdlib_module_names:
        yield f"leaf files import the standard library only, not {top}"
    if layer == "parts" and top not in sys.stdlib_module_names | {"torch"}:
        yield f"{module} is shared by ops and the model: it imports torch and the standard library only, not {top}"
    if layer == "kernels" and top not in sys.stdlib_module_names | {"torch", "triton"}:
        yield f"kernels import torch, triton and the standard library only, not {top}"
    if layer == "convert" and top in TORCH:
        yield f"convert works without {top}; only convert/verify*.py and logits*.py may load a model"
    if layer in {"cli", "verify"} and top in TORCH and found.at_import_time:
        yield f"{layer} imports {top} at start: move it into the function, conversion starts without torch"
    if top in OPTIONAL and found.at_import_time and not (layer == "kernels" and top == "triton"):
        yield f"{top} is optional: import it inside the function that needs it"


def _imports(tree: ast.Module, module: str, known: set[str], is_package: bool) -> Iterator[Import]:
    for node, at_import_time in _walk(tree, at_import_time=True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import_time)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(full if full in known else base, node.lineno, at_import_time)
        elif isinstance(node, ast.Call) and _is_import_call(node):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and not name.value.startswith("."):
                yield Import(name.value, node.lineno, at_import_time)


def _walk(node: ast.AST, *, at_import_time: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and child in node.body:
            inside = inside or _is_guard(node.test)
        now = at_import_time and not inside
        yield child, now
        yield from _walk(child, at_import_time=now)


def _is_guard(test: ast.expr) -> bool:
    called = test.func if isinstance(test, ast.Call) else test
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    return name == "TYPE_CHECKING" or (
        isinstance(test, ast.Call) and name.startswith("is_") and name.endswith("_available")
    )


def _is_import_call(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in {"import_module", "__import__"} and bool(node.args)


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _is_door(module: str) -> bool:
    return module == f"{ROOT}.convert"


def _package_files(root: Path) -> Iterator[tuple[Path, tuple[str, bool]]]:
    for folder, _, names in os.walk(root / ROOT, followlinks=True):
        for name in names:
            path = Path(folder, name)
            if path.suffix == ".py":
                parts = path.relative_to(root).with_suffix("").parts
                is_package = parts[-1] == "__init__"
                yield path, (".".join(parts[:-1] if is_package else parts), is_package)


def _label(path: Path, root: Path) -> str:
    return str(path.resolve().relative_to(root.resolve()))


def _listed(layers: set[str]) -> str:
    return ", ".join(sorted(layers))
