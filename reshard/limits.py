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
JSON_VALUES = 750_000
"""Of one, and of a safetensors header: Kimi K2's index as w8a8_mix has 0.49 million, R1's 91,991 tensors in one file
0.74. Each takes up to 350 bytes of memory, and what is made of it as many."""
MANIFEST_VALUES = 8_000_000
"""100 MB have 4 million."""
JSON_DEPTH = 64
"""Levels of lists and objects. Configs have 8; later steps that recurse stay far from Python's limit of 1,000."""
JSON_NUMBER = 300
"""Characters of a number: as many make no whole number that a float cannot hold, and configs have some of 40."""

# safetensors headers
HEADER_BYTES = 100_000_000
"""The format's own limit."""
NAME_CHARACTERS = 500
"""Of a tensor's name, or a key. Published checkpoints have up to 120; some patterns take the square of it."""
DIMENSIONS = 32
"""Of a tensor. Checkpoints have 5 (convolutions over video), NumPy allows 64."""

# config.json
SIZE = 2**31 - 1
"""Of a dimension, or a count."""
LAYERS = 1_000
"""Of a model. Published ones have up to 126; each is a line in reports and an entry in manifests."""
EXPERTS = 10_000
"""Of a layer. Published models have up to 512; a synthetic one has three tensors for each."""
CONFIG_KEYS = 1_000
"""Of what speaks of one model, each looked at for what it may decide. Published configs have up to 100."""
WORD_CHARACTERS = 200
"""Of a name in it: of a model type, an activation."""
MAX_BYTES = 2**63 - 1
"""Of a tensor, a dimension, an offset: what file systems and other readers count with."""

TOML_BYTES = 1 << 15
"""Of a device profile: they have 2 KB. Dotted keys take the square of it."""

# a synthetic checkpoint
SYNTH_TENSORS = 500_000
"""Kimi K2 as w8a8_mix, with the most tensors of each linear, has 0.49 million; planning takes 550 MB."""
SYNTH_BYTES = 1 << 46
"""Kimi K2 in FP32 has 4 TB."""

# Regular expressions in configs
PATTERN_CHARACTERS = 500
"""Of one. Published ones have up to 100."""
PATTERN_PARTS = 2_000
"""Characters, classes, groups of one, with all that counted repeats stand for."""
PATTERN_DEPTH = 50
"""Groups within groups; Python's parser and the matcher recurse."""
MATCHING_SECONDS = 3
"""Of a processor, for all names and patterns that one section lists. The longest published lists take 0.5 s."""

# What comes over a network
LISTING_BYTES = 16 * MIB
"""Of a hub's description of a repository, or of a server's page: 50,000 files with their digests."""
LISTING_FILES = 10_000
"""Of a folder that is not on this host; DeepSeek-R1 has 180. A plain server is asked for the size of each."""
LISTING_SECONDS = 60.0
"""For a file system to list a folder; its driver shows nothing of it before all is there."""
LISTING_MEMORY = 256 * MIB
"""That the process may take meanwhile: s3fs holds some 1.5 KB of each object, however many there are."""
NAME_BYTES = 255
"""Of a file's name: Linux' own limit."""
PROGRESS_BYTES = 1 << 16
"""A try to fetch a range that brought less has failed, and so has one that brings less in SILENCE_SECONDS."""
SILENCE_SECONDS = 10.0
"""huggingface_hub waits as long; HF_HUB_DOWNLOAD_TIMEOUT takes its place for a hub."""
DRIVER_SECONDS = 30.0
"""As SILENCE_SECONDS, of a driver that tries again by itself before it says that it failed."""
WHOLE_PIECE_SPEED = 1 << 16
"""Bytes a second that must come on top of that from a driver that shows a range only when all of it is there."""
PUT_SPEED = MIB
"""Bytes a second that a put into a store must reach over all, beyond DRIVER_SECONDS: 280 MiB are given up after 310 s.
Drivers send parts of 50 MiB, ten at a time, before they say that any has arrived; some say nothing before the end."""
WRONG_TRIES = 3
"""As many in a row that were too slow, or answered with another range than was asked for, and it is over."""
WAIT_SECONDS = 600.0
"""The longest wait that a busy server may ask for."""

# what is said
LINE_CHARACTERS = 4000
"""Of a message, a cell of a table: of a longer one the middle is left out. Paths may have as many."""
