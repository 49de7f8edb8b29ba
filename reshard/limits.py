"""Every bound of the program: a number, and why it is that one."""

JSON_BYTES = 256 << 20
"""Of a config, an index, a description, a manifest: one of 126 layers for 128 ranks has 100 MB."""

TOML_BYTES = 1 << 20
"""Of a device profile: they have 2 KB."""
