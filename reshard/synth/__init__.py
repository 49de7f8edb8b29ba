"""Synthetic checkpoints: every tensor of a model, named, shaped and quantised as in a real one."""
