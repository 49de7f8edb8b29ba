"""What runs on a device: loading a rank's shard, and the dense layers split over a group.

    shard = load_shard("r1-tp8", tp_rank=3, device="npu:3")
    ffn = DenseFFN(shard.layer(0), group=group)
    y_TH = ffn(x_TH)

Of `reshard` it imports the manifest, the errors, names and activations (the vLLM hook `reshard.checks.serving_option`
too; a test holds that), and no serving engine.
"""

from reshard_runtime.ffn import DenseFFN
from reshard_runtime.loader import load_shard
from reshard_runtime.shard import LayerShard, Shard

__all__ = ["DenseFFN", "LayerShard", "Shard", "load_shard"]
