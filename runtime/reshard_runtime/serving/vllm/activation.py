"""What the engine computes between a dense layer's matrices, against what the set's model does.

The engine's own code is asked (reshard_runtime.probe), once, when the layers are filled. vLLM builds its DeepSeek MLPs
with silu whatever a config.json says of a limit.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger

from reshard.checks.serving_option import OPTION
from reshard.errors import ShardError
from reshard.manifest import Manifest
from reshard.model.activation import not_computed
from reshard.model.parts import DENSE_FFN
from reshard.safe_text import safe_line
from reshard_runtime.probe import answers, disagreement, without_linears

_log = init_logger("vllm.denseffn_shards")


class _Passed(nn.Module):
    """In the place of an engine's linear: what it is given, and no bias."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x, None


def compare_activations(mlps: Mapping[int, Any], manifest: Manifest, dtype: torch.dtype, folder: str) -> None:
    """Raises ShardError with both where they differ, or where a layer that is split has an activation not known here.

    An engine's own partition is filled all the same then: a line of the log says that nothing was compared.
    """
    said = {layer.index: layer.activation for layer in manifest.layers}
    for index, mlp in mlps.items():
        activation, is_split = said[index], hasattr(mlp, "group")
        if activation is None or not activation.is_known:
            problem = f"layer {index}: {not_computed(activation)}"
            if is_split:
                raise ShardError(f"{folder}: {problem}; without {OPTION} the engine's own partition is filled")
            _log.warning(
                "denseffn_shards: what the engine computes is not compared with the shards: %s", safe_line(problem)
            )
            continue
        between = mlp.act_fn if is_split else without_linears(mlp, {m.name: _Passed() for m in DENSE_FFN.modules})
        with torch.compiler.set_stance("force_eager"):  # else vLLM compiles its activation for these sizes
            found = answers(between, dtype, next(mlp.parameters()).device)
        difference = disagreement(found, activation, dtype)
        if difference is not None:
            raise ShardError(
                f"{folder}: layer {index}'s activation is {activation}, the engine's {type(mlp).__name__} computes "
                f"another: {difference}; serve the model that the set was cut from, in an engine that computes it so"
            )
