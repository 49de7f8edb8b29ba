"""config.json: a model's sizes, which of its layers are dense, and what those compute."""

from reshard.model.config.names import agree_on_dense, is_mtp_layer
from reshard.model.config.read import ModelConfig, has_experts, known_dense_layers, read_model_config
from reshard.model.config.rules import experts_key
from reshard.model.config.wrapper import language_config, language_levels

__all__ = [
    "ModelConfig",
    "agree_on_dense",
    "experts_key",
    "has_experts",
    "is_mtp_layer",
    "known_dense_layers",
    "language_config",
    "language_levels",
    "read_model_config",
]
