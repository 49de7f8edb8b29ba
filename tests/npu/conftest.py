"""torch_npu breaks `import torch` without CANN, so these tests run in an environment of their own: `make test-npu`."""

import importlib.util

if importlib.util.find_spec("torch_npu") is None:
    collect_ignore_glob = ["test_*.py"]
