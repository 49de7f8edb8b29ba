"""What runs on a device: loading a rank's shard and the split DenseFFN.

The loader and the module are not part of this release; the package reserves the name. Of `reshard` it may
import `reshard.manifest` and `reshard.errors` only (a test holds that).
"""
