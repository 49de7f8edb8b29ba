"""Checks of a finished shard set: its digests, and its bytes and arithmetic against the source."""
