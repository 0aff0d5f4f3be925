"""`import metis_home` teaches the Auto classes this model, in whatever order things are imported, without torch."""

import subprocess
import sys

import pytest

CHECK = """
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
config = AutoConfig.for_model("metis_home")
assert type(config).__name__ == "MetisHomeConfig", type(config)
assert type(AutoConfig.for_model("metis_home_text")).__name__ == "MetisHomeTextConfig"
from transformers.models.auto.modeling_auto import (
    MODEL_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
assert MODEL_MAPPING[type(config)].__name__ == "MetisHomeModel"
assert MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].__name__ == "MetisHomeForConditionalGeneration"
assert MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)].__name__ == "MetisHomeForConditionalGeneration"
"""

ORDERS = {
    "ours first": "import metis_home",
    "transformers first": "from transformers import AutoModelForImageTextToText\nimport metis_home",
    "stock config in between": "import metis_home\nfrom transformers import Qwen2_5_VLConfig",
    "stock model in between": "import metis_home\nfrom transformers import Qwen2_5_VLForConditionalGeneration",
    "the trainer in between": "import metis_home\nfrom transformers import Trainer",
    "adapters in between": "import metis_home\nimport peft",
    "our config first": "from metis_home import MetisHomeConfig",
    "our model first": "from metis_home import MetisHomeForConditionalGeneration",
}


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_know_the_model(order):
    result = python(ORDERS[order] + CHECK)

    assert result.returncode == 0, result.stderr


def test_importing_the_package_imports_no_torch():
    code = (
        "import sys, metis_home, metis_home.cli, metis_home.convert\n"
        "heavy = {'torch', 'transformers', 'triton', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = python(code)

    assert result.returncode == 0, result.stderr


def test_all_public_names_exist():
    result = python("import metis_home\nfor name in metis_home.__all__: getattr(metis_home, name)")

    assert result.returncode == 0, result.stderr
