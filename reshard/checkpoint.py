"""A checkpoint's DenseFFN, described: which layers, which tensors, where their bytes lie. No tensor data is read.

Whatever the source is, a tensor is a grid of bytes (rows of dim 0, `row_bytes` each) covered by rectangles of files:
one rectangle for a Hugging Face file, one per rank for a shard set.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from reshard.dtypes import itemsize
from reshard.errors import LayersError, SchemeError, ShapesError
from reshard.modelconfig import ModelConfig, read_model_config
from reshard.naming import CONFIG, DOWN, GATE, ROLES, UP, module_name, parse_dense, parse_mlp
from reshard.quantization import declarations
from reshard.schemes import Found, Variant, check_kind, match_variant


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of a tensor's byte grid, and where a file holds it: its first byte, and the bytes from row to row."""

    file: str
    offset: int
    stride: int
    row: int
    column: int
    rows: int
    width: int


@dataclass(frozen=True)
class Conversion:
    """How a tensor was made from others, by name; `rule` is in reshard.convert.rules."""

    rule: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Tensor:
    """A tensor under its Hugging Face name. With a conversion, `parts` is empty: its values are computed."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    conversion: Conversion | None = None

    @property
    def rows(self) -> int:
        """Rows of the byte grid: dim 0, or 1 for a tensor of no dimensions."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the grid."""
        return prod(self.shape[1:]) * itemsize(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Linear:
    """One of a layer's three linears: what it is quantised as, its scale block, its tensors by suffix."""

    variant: Variant
    block: tuple[int, int] | None
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """A dense layer: its index and its linears by role."""

    index: int
    linears: Mapping[str, Linear]

    def tensors(self) -> Iterable[Tensor]:
        """Every tensor of the layer."""
        for role in ROLES:
            yield from self.linears[role].tensors.values()


@dataclass(frozen=True)
class Model:
    """The sizes that the cut depends on. `num_hidden_layers` is None without a config.json."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int | None


@dataclass(frozen=True)
class SourceFile:
    """A file that tensors were taken from: enough to know it again."""

    name: str
    size: int
    header_digest: str


@dataclass(frozen=True)
class Identity:
    """Where the weights come from; a re-cut keeps the identity of what was first cut, its sample too."""

    kind: Literal["folder", "hub", "remote"]
    name: str
    commit: str | None
    files: tuple[SourceFile, ...]
    sample: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A source's DenseFFN. `side_files` (config.json, the description) go with every shard set.

    `total_tensors` and `total_bytes` count all of the source, the rest included.
    """

    identity: Identity
    model: Model
    layers: tuple[Layer, ...]
    side_files: Mapping[str, bytes]
    total_tensors: int
    total_bytes: int
    warnings: tuple[str, ...] = field(default=())

    def tensors(self) -> Iterable[Tensor]:
        """Every DenseFFN tensor, layer by layer."""
        for layer in self.layers:
            yield from layer.tensors()

    @property
    def nbytes(self) -> int:
        """Bytes of the DenseFFN."""
        return sum(tensor.nbytes for tensor in self.tensors())


def describe_layers(
    tensors: Mapping[str, Tensor],
    other_names: Iterable[str],
    config: Mapping[str, Any] | None,
    description: tuple[str, Mapping[str, Any]] | None,
) -> tuple[Model, tuple[Layer, ...], tuple[str, ...]]:
    """The dense layers that the tensors make, checked against config.json and the quantisation's own account.

    tensors: those whose names are a DenseFFN tensor's; other_names: all other names of the source.
    Returns the model, its layers and warnings. Raises LayersError, ShapesError or SchemeError where the accounts
    disagree.
    """
    model_config = read_model_config(config) if config is not None else None
    by_layer: dict[int, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        parsed = parse_dense(name)
        if parsed is None:
            continue
        layer, role, suffix = parsed
        if model_config is None or not _in_prediction_block(layer, model_config):
            by_layer.setdefault(layer, {}).setdefault(role, {})[suffix] = tensor
    _check_dense(by_layer.keys(), other_names, model_config)
    declare = declarations(description, config)
    layers = []
    for index in sorted(by_layer):
        roles = by_layer[index]
        linears = {}
        for role in ROLES:
            module, suffixes = module_name(index, role), roles.get(role, {})
            if not suffixes:
                raise _missing_weight(index, role, roles)
            declared = declare(module, frozenset(suffixes))
            check_kind(module, declared)
            if "weight" not in suffixes:
                raise _missing_weight(index, role, roles)
            found = {suffix: Found(t.dtype, t.shape, t.parts[0].file) for suffix, t in suffixes.items()}
            variant = match_variant(module, declared, found)
            linears[role] = Linear(variant, declared.block, suffixes)
        layers.append(Layer(index, linears))
    model = _check_shapes(layers, model_config)
    return model, tuple(layers), tuple(_warnings(by_layer, model_config))


def _warnings(named: Iterable[int], config: ModelConfig | None) -> Iterator[str]:
    """Where the names alone say which layers are dense, and what of config.json was not understood."""
    alone = f"the dense layers ({numbers(named)}) are taken from names alone"
    if config is None:
        yield f"no {CONFIG} beside the files: {alone}"
        return
    if config.dense_layers is None:
        yield f"{CONFIG}: {config.reason}: {alone}"
    yield from config.warnings


def _missing_weight(index: int, role: str, roles: Mapping[str, Mapping[str, Tensor]]) -> LayersError:
    having = ", ".join(sorted(f"{r}.{s}" for r, suffixes in roles.items() for s in suffixes))
    return LayersError(
        f"{module_name(index, role)}.weight: missing; the checkpoint has of layer {index} only {having}; download the "
        "file that holds it again"
    )


def _in_prediction_block(layer: int, config: ModelConfig) -> bool:
    """A multi-token-prediction block lies behind the last layer and is never DenseFFN."""
    return 0 <= layer - config.num_hidden_layers < config.prediction_layers


def _check_dense(named: Iterable[int], other_names: Iterable[str], config: ModelConfig | None) -> None:
    dense = set(named)
    if not dense:
        because = f" ({CONFIG}: {config.reason})" if config else ""
        raise LayersError(
            "no dense layer: no tensor is named model.layers.{i}.mlp.{gate,up,down}_proj.weight" + because
        )
    if config is not None and config.dense_layers is not None and config.dense_layers != dense:
        only_named, only_config = dense - config.dense_layers, config.dense_layers - dense
        raise LayersError(
            f"{CONFIG} and the tensors' names disagree on the dense layers: {CONFIG} ({config.reason}) gives "
            f"{numbers(config.dense_layers)}, the names give {numbers(dense)} "
            f"(only in {CONFIG}: {numbers(only_config)}; only in the names: {numbers(only_named)}); "
            f"is {CONFIG} of this checkpoint?"
        )
    for name in other_names:
        parsed = parse_mlp(name)
        if parsed and parsed[0] in dense:
            raise SchemeError(f"{name}: stands in a dense layer and is no tensor that the split table knows")


def _check_shapes(layers: list[Layer], config: ModelConfig | None) -> Model:
    first = layers[0].linears[GATE].tensors["weight"]
    intermediate_size, hidden_size = first.shape
    where = first.name
    if config is not None:
        intermediate_size, hidden_size, where = config.intermediate_size, config.hidden_size, CONFIG
    for layer in layers:
        gate, up = layer.linears[GATE], layer.linears[UP]
        for role in ROLES:
            weight = layer.linears[role].tensors["weight"]
            wanted = (hidden_size, intermediate_size) if role == DOWN else (intermediate_size, hidden_size)
            if weight.shape != wanted:
                raise ShapesError(
                    f"{weight.name} in {weight.parts[0].file}: shape {list(weight.shape)}, {where} makes it "
                    f"{list(wanted)} (hidden_size {hidden_size}, intermediate_size {intermediate_size}); is {where} "
                    "of this checkpoint?"
                )
        check_pair(layer.index, gate, up)
    return Model(
        model_type=config.model_type if config else "",
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=config.num_hidden_layers if config else None,
    )


def check_pair(layer: int, gate: Linear, up: Linear) -> None:
    """Raises SchemeError where gate and up differ: they are stacked."""
    if gate.variant != up.variant:
        raise SchemeError(
            f"model.layers.{layer}.mlp: gate_proj is {gate.variant.scheme} ({', '.join(gate.tensors)}), up_proj is "
            f"{up.variant.scheme} ({', '.join(up.tensors)}); they are stacked, so both must be the same"
        )
    for suffix, tensor in gate.tensors.items():
        other = up.tensors[suffix]
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            raise SchemeError(
                f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, {other.name} is {other.dtype} "
                f"{list(other.shape)}; they are stacked, so both must be the same"
            )


def numbers(values: Iterable[int]) -> str:
    """Layer numbers, runs shortened: 0-2, 7."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1][1:] = [value]
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"
