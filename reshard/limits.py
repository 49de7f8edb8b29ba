"""The bounds of what is read, believed and waited for: a number, and why it is that one.

Above all that real checkpoints, servers and sets have, and low enough that what is made to exhaust a machine is
refused in one line, within seconds and some hundred MiB.
"""

MIB = 1 << 20

# JSON: config.json, indexes, descriptions, manifests, answers of hubs.
JSON_BYTES = 64 * MIB
"""Of one file. The largest description of a real model, Kimi K2's 0.2 million tensors, has 16 MiB."""
JSON_VALUES = 3_000_000
"""In one file; each is up to 200 bytes of memory. One header with all of Kimi K2's tensors would have 1.7 million."""
JSON_DEPTH = 64
"""Levels of lists and objects. Configs have 8; later steps that recurse stay far from Python's limit of 1,000."""
JSON_NUMBER = 300
"""Characters of a number: as many make no whole number that a float cannot hold, and configs have some of 40."""

# safetensors headers
HEADER_BYTES = 100_000_000
"""The format's own limit."""
MAX_BYTES = 2**63 - 1
"""Of a tensor, a dimension, an offset: what file systems and other readers count with."""
