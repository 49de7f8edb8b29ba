"""Hooks for what serves a model. Nothing here is imported by `reshard_runtime` itself."""
