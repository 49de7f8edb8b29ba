"""What vLLM does with the plugin in each of its processes."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
import vllm.plugins
vllm.plugins.load_general_plugins()
from vllm.model_executor import model_loader
first = model_loader._LOAD_FORMAT_TO_MODEL_LOADER["denseffn_shards"]
from reshard_runtime.serving.vllm import register
register()
vllm.plugins.plugins_loaded = False
vllm.plugins.load_general_plugins()
assert model_loader._LOAD_FORMAT_TO_MODEL_LOADER["denseffn_shards"] is first
print(first.__name__, "vllm.model_executor.models.deepseek_v2" in sys.modules)
"""


@pytest.mark.parametrize("other", ["runtime.py", "runtime/__init__.py"])
def test_it_is_found_and_registers_once_without_any_model(tmp_path: Path, other: str) -> None:
    """The processes that only talk to clients import no model: that may start a device.

    Modules of the working directory come first, and one of them may be called runtime.
    """
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_text("raise RuntimeError('the working directory has a module called runtime')")
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "DenseFFNShardsLoader False"
