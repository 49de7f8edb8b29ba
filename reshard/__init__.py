"""Cut the DenseFFN weights of a checkpoint into one verified safetensors shard per rank."""

__version__ = "0.1.0"
