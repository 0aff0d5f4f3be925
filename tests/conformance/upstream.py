"""transformers' own tests, as an importable package `transformers_tests`, from the sdist of the installed version.

The wheel holds no tests; the sdist holds the shared mixins, without the parts that they import from other folders of
the repository. Those parts get empty stand-ins here, so what is tested is exactly what the sdist brings. Nothing of it
is committed: it is fetched by pip once per version and kept in a cache folder.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "transformers_tests"

_STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def fetch(version: str, cache: Path) -> Path:
    """Return the folder that makes `import transformers_tests` work; fetch and unpack the sdist if it is not there."""
    home = cache / f"transformers-{version}"
    if (home / PACKAGE).exists():
        return home
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*download, "-d", scratch, f"transformers=={version}"], check=True)
        (archive,) = Path(scratch).glob("transformers-*.tar.gz")
        with tarfile.open(archive) as sdist:
            sdist.extractall(scratch, filter="data")
        package = Path(scratch, "home", PACKAGE)
        shutil.copytree(Path(scratch, f"transformers-{version}", "tests"), package)
        _add_stand_ins(package)
        package.parent.rename(home)  # complete, or not there
    return home


def _add_stand_ins(package: Path) -> None:
    (package / "__init__.py").touch()
    for name, source in _STAND_INS.items():
        path = package / name
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(f'"""Not in the sdist: an empty stand-in."""\n\n{source}')
