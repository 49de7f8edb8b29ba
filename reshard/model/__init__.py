"""The model: its config, the names of its layers, the activation."""
