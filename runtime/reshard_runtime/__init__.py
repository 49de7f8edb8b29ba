"""What runs on a device: loading a rank's shard, and the dense layers split over a group.

    shard = load_shard("r1-tp8", tp_rank=3, device="npu:3")
    ffn = DenseFFN(shard.layer(0), group=group)
    y_TH = ffn(x_TH)

Of `reshard` it imports the vocabulary: names, schemes, element types, headers, the manifest and what fits it, errors
(the vLLM hook `reshard.checks.serving_option` too, the demo what cuts and verifies; a test holds that). It imports no
serving engine.
"""

from reshard_runtime.ffn import DenseFFN
from reshard_runtime.loader import load_shard, load_tensors
from reshard_runtime.shard import LayerShard, Shard

__all__ = ["DenseFFN", "LayerShard", "Shard", "load_shard", "load_tensors"]
