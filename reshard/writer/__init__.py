"""From a plan to files: bytes, digests, temporary names, fsync, rename, the manifest last."""
