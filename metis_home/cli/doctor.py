"""`metis-home doctor`: what is installed, what works, and what to install for what does not."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import io
import json
import platform
import re
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import typer

DISTRIBUTION = "metis_home"
# Where the name to import is not the name to install.
IMPORT_NAMES = {"flash-attn": "flash_attn", "qwen-vl-utils": "qwen_vl_utils"}
# Compiled for one torch or one driver: present does not mean usable, so these are really imported.
IMPORTED = ("torch", "torchvision", "qwen-vl-utils", "triton", "flash-attn", "transformers", "safetensors")
PURPOSES = {
    "gpu": "fused kernels and FlashAttention on NVIDIA GPUs",
    "vision": "video, and per-image sizes in messages",
    "train": "supervised and reinforcement training",
    "demo": "the demo on real weights",
    "dev": "tests and checks of the source tree",
}
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)\s*([^;]*)(?:;(.*))?$")
_EXTRA = re.compile(r"extra == [\"']([^\"']+)[\"']")

Status = Literal["ok", "missing", "broken", "wrong version"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One dependency: what is wanted and what is there."""

    name: str
    extra: str | None
    wanted: str
    version: str | None
    status: Status
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One way to compute the branch FFNs."""

    name: str
    usable: bool
    reason: str


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command("doctor")(doctor)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Report versions, usable backends and extras, and what to install for what is missing.

    Fails (status 1) if something that answering needs is missing, broken or of a wrong version.

    Example: metis-home doctor
    """
    packages, notes = examine_packages()
    backends = examine_backends()
    advice = advise(packages)
    if as_json:
        report = {
            "metis_home": own_version(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": [dataclasses.asdict(package) for package in packages],
            "backends": [dataclasses.asdict(backend) for backend in backends],
            "sandbox": dataclasses.asdict(examine_sandbox()),
            "advice": advice,
            "notes": notes,
        }
        print(json.dumps(report, indent=2))
    else:
        _print_report(packages, backends, advice, notes)
    if any(package.extra is None and package.status != "ok" for package in packages):
        raise typer.Exit(1)


def own_version() -> str:
    """The installed version of this package; a bare checkout has none."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "(source tree, not installed)"


def examine_packages() -> tuple[list[Package], list[str]]:
    """Compare every dependency that this package declares with what is installed; also return remarks on that."""
    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return [], ["metis_home is not installed, so its dependencies are not known: pip install -e ."]
    packages = []
    for line in declared:
        match = _REQUIREMENT.match(line)
        if match is None:
            continue
        name, wanted, marker = match[1], match[2].strip(" ()"), match[3] or ""
        if 'sys_platform == "linux"' in marker.replace("'", '"') and sys.platform != "linux":
            continue
        extra = _EXTRA.search(marker)
        packages.append(_examine(name, wanted, extra[1] if extra else None))
    order = [None, *PURPOSES]
    packages.sort(key=lambda package: order.index(package.extra) if package.extra in order else len(order))
    return packages, []


def examine_backends() -> list[Backend]:
    """What `ops.set_backend` can choose here."""
    if importlib.util.find_spec("torch") is None:
        return [Backend(name="torch", usable=False, reason="torch is not installed")]
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Backend(name="torch", usable=False, reason=f"torch cannot be imported: {error}")]
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    where = f"{len(gpus)} x {gpus[0]}" if gpus else "CPU"
    reference = Backend(name="torch", usable=True, reason=f"torch {torch.__version__} on {where}")
    if importlib.util.find_spec("triton") is None:
        return [reference, Backend(name="triton", usable=False, reason="triton is not installed")]
    if not gpus:
        return [reference, Backend(name="triton", usable=False, reason="no GPU that this torch can use")]
    from .. import ops

    usable, reason = ops.kernels_usable("cuda")
    reason = f"{gpus[0]}; {reason}"
    return [reference, Backend(name="triton", usable=usable, reason=reason)]


def examine_sandbox() -> Backend:
    """Can the Python tool run programs of a model safely here? Tried for real."""
    from ..training.tools.sandbox import sandbox_available

    usable, reason = sandbox_available()
    return Backend(name="python tool", usable=usable, reason=reason)


def advise(packages: list[Package]) -> list[str]:
    """One line per thing to do, the most important first."""
    lines = [
        f"pip install '{package.name}{package.wanted}'   # {package.status}: answering needs it"
        for package in packages
        if package.extra is None and package.status != "ok"
    ]
    for package in packages:
        if package.extra is None or package.status not in ("broken", "wrong version"):
            continue
        if package.name in ("torchvision", "qwen-vl-utils") and package.status == "broken":
            lines.append(
                "pip uninstall torchvision   # or install the build that fits this torch: it breaks images too"
            )
        else:
            lines.append(f"pip install '{package.name}{package.wanted}'   # {package.status}")
    for extra in dict.fromkeys(package.extra for package in packages if package.extra and package.status == "missing"):
        lines.append(f"pip install 'metis_home[{extra}]'   # {PURPOSES.get(extra, 'extra ' + extra)}")
    return list(dict.fromkeys(lines))


def _examine(name: str, wanted: str, extra: str | None) -> Package:
    def found(version: str | None, status: Status, detail: str = "") -> Package:
        return Package(name=name, extra=extra, wanted=wanted, version=version, status=status, detail=detail)

    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return found(None, "missing")
    if not _satisfies(version, wanted):
        return found(version, "wrong version")
    if name in IMPORTED:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                importlib.import_module(IMPORT_NAMES.get(name, name))
        except Exception as error:  # a build for another torch fails in many ways, and each is the answer here
            return found(version, "broken", f"{type(error).__name__}: {error}")
    return found(version, "ok")


def _satisfies(version: str, wanted: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # comes with transformers, which is then reported as missing
        return True
    return SpecifierSet(wanted).contains(version, prereleases=True)


def _print_report(packages: list[Package], backends: list[Backend], advice: list[str], notes: list[str]) -> None:
    print(f"metis_home {own_version()}   Python {platform.python_version()}   {platform.platform()}")
    heading: str | None = ""
    for package in packages:
        if package.extra != heading:
            heading = package.extra
            print(f"\n{heading}: {PURPOSES.get(heading, '')}" if heading else "\nneeded to convert and answer")
        detail = f"   {package.detail.splitlines()[0][:90]}" if package.detail else ""
        print(f"  {package.name:<16} {package.version or '-':<14} {package.status:<14} {package.wanted}{detail}")
    print("\nbackends")
    for backend in backends:
        _print_backend(backend)
    print("\nsandbox")
    _print_backend(examine_sandbox())
    if advice:
        print("\nto do, as you need it")
        for line in advice:
            print(f"  {line}")
    for note in notes:
        print(f"\n{note}")


def _print_backend(backend: Backend) -> None:
    print(f"  {backend.name:<16} {'usable' if backend.usable else 'not usable':<14} {backend.reason}")
