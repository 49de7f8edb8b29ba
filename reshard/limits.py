"""The bounds of what is read, believed and waited for: a number, and why it is that one.

Above all that real checkpoints, servers and sets have, and low enough that what is made to exhaust a machine is
refused in one line, within seconds and some hundred MiB.
"""

MIB = 1 << 20

# JSON
JSON_BYTES = 64 * MIB
"""Of a config, an index, a description, an answer: Kimi K2's description, of 0.2 million tensors, has 16 MiB."""
MANIFEST_BYTES = 256 * MIB
"""One of 126 layers for 128 ranks has 100 MB."""
JSON_BYTES_PER_VALUE = 16
"""Of those that may be read, so many for each value, which takes up to 250 bytes of memory: headers have 15."""
JSON_DEPTH = 64
"""Levels of lists and objects. Configs have 8; later steps that recurse stay far from Python's limit of 1,000."""
JSON_NUMBER = 300
"""Characters of a number: as many make no whole number that a float cannot hold, and configs have some of 40."""

# safetensors headers
HEADER_BYTES = 100_000_000
"""The format's own limit."""
NAME_CHARACTERS = 500
"""Of a tensor's name. Published checkpoints have up to 120; some patterns take the square of it."""
MAX_BYTES = 2**63 - 1
"""Of a tensor, a dimension, an offset: what file systems and other readers count with."""

TOML_BYTES = MIB
"""Of a device profile: they have 2 KB."""

# Regular expressions in configs
PATTERN_CHARACTERS = 1_000
"""Of one. Published ones have up to 100."""
PATTERN_PARTS = 2_000
"""Characters, classes, groups of one, with all that counted repeats stand for."""
PATTERN_DEPTH = 50
"""Groups within groups; Python's parser and the matcher recurse."""
MATCHING_SECONDS = 10
"""Of a processor, for all names and patterns that one section lists. The longest published lists take 0.5 s."""
