"""Every activation that is computed, with the config.json that asks for it and the MLP that transformers makes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from reshard.model.activation import GELU, GELU_TANH, SILU, Activation

LIMIT = 0.5  # of values of about 1: many are above it


@dataclass(frozen=True)
class Case:
    """`config`: what config.json says beside the sizes. `module`: transformers' MLP class, by its model."""

    activation: Activation
    config: dict[str, Any]
    module: str

    def mlp(self, hidden: int, intermediate: int, seed: int = 0) -> Any:
        """Transformers' own MLP with weights of 1 / sqrt(in_features), in float32."""
        module, config = _classes(self.module)
        torch.manual_seed(seed)
        own = {key: value for key, value in self.config.items() if key != "model_type"}
        mlp = module(config(hidden_size=hidden, intermediate_size=intermediate, **own))
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            torch.nn.init.normal_(linear.weight, std=linear.weight.shape[1] ** -0.5)
        return mlp.requires_grad_(False)


def _classes(name: str) -> tuple[Any, Any]:
    if name == "glm5_next":
        from transformers.models.glm5_next import configuration_glm5_next, modeling_glm5_next

        return modeling_glm5_next.Glm5NextTextMLP, configuration_glm5_next.Glm5NextTextConfig
    if name == "gemma":
        from transformers.models.gemma import configuration_gemma, modeling_gemma

        return modeling_gemma.GemmaMLP, configuration_gemma.GemmaConfig
    from transformers.models.llama import configuration_llama, modeling_llama

    return modeling_llama.LlamaMLP, configuration_llama.LlamaConfig


_GLM: dict[str, Any] = {"model_type": "glm5_next_text", "swiglu_limit": LIMIT}
CASES = {
    "silu": Case(Activation(SILU), {"hidden_act": "silu"}, "llama"),
    "silu with a limit": Case(Activation(SILU, LIMIT), {**_GLM, "hidden_act": "silu"}, "glm5_next"),
    "gelu": Case(Activation(GELU), {"hidden_act": "gelu"}, "llama"),
    "gelu with a limit": Case(Activation(GELU, LIMIT), {**_GLM, "hidden_act": "gelu"}, "glm5_next"),
    "gelu_pytorch_tanh": Case(Activation(GELU_TANH), {"hidden_act": "gelu_pytorch_tanh"}, "gemma"),
    "gelu_pytorch_tanh with a limit": Case(
        Activation(GELU_TANH, LIMIT), {**_GLM, "hidden_act": "gelu_pytorch_tanh"}, "glm5_next"
    ),
}


def checkpoint_of(mlp: Any, folder: Path, config: dict[str, Any] | None) -> Path:
    """A checkpoint of one dense layer, with a config.json if there is one."""
    folder.mkdir(parents=True)
    tensors = {f"model.layers.0.mlp.{name}": value.contiguous() for name, value in mlp.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    intermediate, hidden = mlp.gate_proj.weight.shape
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 1, "model_type": "llama"}
    if config is not None:
        (folder / "config.json").write_text(json.dumps(sizes | config))
    return folder
