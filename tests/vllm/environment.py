"""What vLLM wants of the environment on a CPU, two workers on one NUMA node; started processes inherit it."""

import importlib.util
import os
from pathlib import Path

_vllm = importlib.util.find_spec("vllm")
INSTALLED = _vllm is not None and _vllm.origin is not None

if _vllm is not None and _vllm.origin is not None:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if not (Path(_vllm.origin).parent / "v1/attention/backends/mla/cpu_mla.py").exists():
        os.environ["VLLM_MLA_DISABLE"] = "1"  # a vLLM that has no MLA for the CPU runs such models without
