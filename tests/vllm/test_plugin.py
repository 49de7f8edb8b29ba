"""What vLLM does with the plugin in each of its processes."""

import subprocess
import sys

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


def test_it_is_found_and_registers_once_without_any_model() -> None:
    """The processes that only talk to clients import no model: that may start a device."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "DenseFFNShardsLoader False"
