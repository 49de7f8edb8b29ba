"""Hooks for what serves a model. Nothing here is imported by `runtime` itself."""
