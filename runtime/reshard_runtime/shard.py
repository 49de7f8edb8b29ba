"""What a rank holds: a dense layer's linears, and their tensors.

Shapes: H hidden_size, I intermediate_size, R tp_size, L = I'/R the rank's share of I' (I with its
padding, if any).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from reshard.errors import ShardError
from reshard.model.activation import Activation, not_computed


@dataclass(frozen=True)
class LinearShard:
    """One rank's part of a linear.

    `gate_up_proj`: rows r·L..(r+1)·L of gate, then the same rows of up: weight [2L, H]. `down_proj`: columns
    r·L..(r+1)·L: weight [H, L]. `tensors` by suffix, dtypes and shapes as in the file. `block` (rows, columns) is what
    one scale of the weight stands for, where scales stand for blocks.
    """

    name: str
    scheme: str
    block: tuple[int, int] | None
    tensors: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class LayerShard:
    """One rank's part of a dense layer. `set_digest` (BLAKE3 of the manifest) tells which shard set it is of.

    `activation` is None where the checkpoint did not say it.
    """

    index: int
    tp_rank: int
    tp_size: int
    hidden_size: int
    intermediate_size: int
    share: int
    set_digest: str
    gate_up: LinearShard
    down: LinearShard
    activation: Activation | None

    @property
    def linears(self) -> tuple[LinearShard, LinearShard]:
        """Both."""
        return self.gate_up, self.down

    def changed(self, change: Callable[[LinearShard], LinearShard]) -> "LayerShard":
        """The layer with every linear changed."""
        return replace(self, gate_up=change(self.gate_up), down=change(self.down))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(linear.nbytes for linear in self.linears)

    def known_activation(self) -> Activation:
        """Its activation. Raises ShardError for one that is not said, or whose formula is not known."""
        problem = not_computed(self.activation)
        if problem is not None or self.activation is None:
            raise ShardError(f"layer {self.index}: {problem}")
        return self.activation


@dataclass(frozen=True)
class Shard:
    """One rank's part of a model's dense layers. `file_bytes` is the shard file's size.

    A `DenseFFN` may hold its weights in a form of its device (packed, FRACTAL_NZ): let the shard go, or take each layer
    out of `layers`, and memory does not hold both.
    """

    file: str
    file_bytes: int
    tp_rank: int
    tp_size: int
    model_type: str
    hidden_size: int
    intermediate_size: int
    set_digest: str
    layers: dict[int, LayerShard]

    @property
    def sizes(self) -> tuple[int, int]:
        """H and I."""
        return self.hidden_size, self.intermediate_size

    def layer(self, index: int) -> LayerShard:
        """The dense layer `index`. Raises ShardError if the shard has none of that index."""
        try:
            return self.layers[index]
        except KeyError:
            raise ShardError(
                f"{self.file}: it has no layer {index}, its dense layers are {', '.join(map(str, self.layers))}"
            ) from None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(layer.nbytes for layer in self.layers.values())
