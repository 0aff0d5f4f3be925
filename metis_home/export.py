"""Write a model with its code, so that `trust_remote_code=True` loads it where this package is not installed."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.dynamic_module_utils import get_relative_import_files

from .errors import UnsupportedError

if TYPE_CHECKING:
    from .modeling import MetisHomeForConditionalGeneration
    from .processing import MetisHomeProcessor

_HEAD = "modeling.MetisHomeForConditionalGeneration"
_CONFIG_MAP = {
    "AutoConfig": "configuration.MetisHomeConfig",
    "AutoModel": "modeling.MetisHomeModel",
    "AutoModelForImageTextToText": _HEAD,
    "AutoModelForMultimodalLM": _HEAD,
}
_PROCESSOR_MAP = {"AutoProcessor": "processing.MetisHomeProcessor"}


def export_with_code(
    model: "MetisHomeForConditionalGeneration", out_dir: str | Path, processor: "MetisHomeProcessor | None" = None
) -> list[Path]:
    """Save `model`, and `processor` if there is one, together with the source files that they need.

    The copies run on the `torch` backend: fused kernels come with the package.

    Args:
        model: the model. processor: its processor. out_dir: a directory, created if need be.
    Returns:
        The source files written.
    Raises:
        UnsupportedError: `model` wraps the model (an adapter, a parallel wrapper) and is not one itself.
    """
    if type(model).__name__ != _HEAD.split(".")[1]:
        raise UnsupportedError(
            f"only a MetisHomeForConditionalGeneration can be exported with its code; found {type(model).__name__}. "
            "Unwrap it first (merge_and_unload() for adapters)."
        )
    out_dir = Path(out_dir)
    model.save_pretrained(out_dir)
    _add_auto_map(out_dir / "config.json", _CONFIG_MAP)
    roots = ["configuration", "modeling"]
    if processor is not None:
        processor.save_pretrained(out_dir)
        roots.append("processing")
        _add_auto_map(out_dir / "processor_config.json", _PROCESSOR_MAP)

    here = Path(__file__).parent
    needed = {here / f"{root}.py" for root in roots}
    for root in tuple(needed):
        needed |= {Path(file) for file in get_relative_import_files(root)}
    return [Path(shutil.copy2(file, out_dir / file.name)) for file in sorted(needed)]


def _add_auto_map(path: Path, auto_map: dict[str, str]) -> None:
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["auto_map"] = auto_map
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
