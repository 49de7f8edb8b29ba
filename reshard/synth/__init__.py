"""Synthetic checkpoints: every tensor of a model, named, shaped and quantized as in a real one."""
