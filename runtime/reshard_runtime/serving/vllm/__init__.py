"""vLLM's plugin: the load format `denseffn_shards`.

    vllm serve MODEL --load-format denseffn_shards --model-loader-extra-config '{"shards": "r1-tp8"}'
      --data-parallel-size 16 --additional-config '{"denseffn_tensor_parallel_size": 8}'

With the option, the dense layers are built with this rank's part only, and their forward runs over a group of
data-parallel ranks. Without it, the layers that the engine itself has built partitioned are filled. docs/serving.md
tells the rest.
"""

from functools import cache

LOAD_FORMAT = "denseffn_shards"


@cache
def register() -> None:
    """Make the load format known. vLLM calls it in each of its processes, maybe more than once."""
    from vllm.model_executor.model_loader import register_model_loader

    from reshard_runtime.serving.vllm.loader import DenseFFNShardsLoader

    register_model_loader(LOAD_FORMAT)(DenseFFNShardsLoader)
