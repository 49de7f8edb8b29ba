"""The estimate as one document: `--format json` prints its fields; the tables, the chart and the picture show them."""

from dataclasses import dataclass
from typing import Any

from reshard.estimate.step import Run
from reshard.manifest import ModelDims
from reshard.model.parts import DENSE_FFN
from reshard.safe_text import safe_line


@dataclass(frozen=True)
class FixedRows:
    """With a fixed number of rows, and with as many rows as tokens."""

    unneeded_rows_per_layer: int
    fixed: Run
    exact: Run


@dataclass(frozen=True)
class Alignment:
    """Whether a rank's matrices are whole tiles of the device and whole blocks of 128; None where there are none.

    notes: what kernels would pad and, last, why the int8 kernel refuses what is too wide.
    """

    tiles: bool | None
    blocks: bool | None
    too_wide: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Size:
    """A group size.

    held_bytes: all of the part on a device, as it runs it; shard_tensor_bytes: as the file has them.
    gathered_as_int8: None where tokens are not quantized (BF16, and what is run as BF16).
    """

    tp_size: int
    share: int
    padded: bool
    held_bytes: int
    shard_tensor_bytes: int
    saved_bytes: int
    network: str
    alignment: Alignment
    gathered_as_bf16: Run
    gathered_as_int8: Run | None
    fixed_rows: FixedRows | None

    @property
    def runs(self) -> Run:
        """What the runtime does: it quantizes before the gather where the layer is quantized."""
        return self.gathered_as_int8 or self.gathered_as_bf16


@dataclass(frozen=True)
class Refused:
    """A group size that cannot be, and why."""

    tp_size: int
    reason: str


@dataclass(frozen=True)
class SchemeEstimate:
    """A part's sizes in a scheme, in the order asked for; unsplit: at the tensor-parallel size, which is 1 without.

    part: its key. layers: how many have it, 1 for what the model has once.
    """

    scheme: str
    part: str
    layers: int
    unsplit_bytes: int
    unsplit_seconds: float
    sizes: tuple[Size, ...]
    refused: tuple[Refused, ...]
    recommended: int | None
    reasons: tuple[str, ...]

    @property
    def label(self) -> str:
        """The scheme, and another part than the DenseFFN."""
        return self.scheme if self.part == DENSE_FFN.key else f"{self.scheme} {self.part}"


@dataclass(frozen=True)
class Chosen:
    """Which of several parts to split, and for what: time and bytes less than with all of them whole.

    others: why each of the others stays whole, and what it would give, a line each.
    """

    scheme: str
    tp_sizes: dict[str, int]
    saved_seconds: float
    saved_bytes: int
    others: tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """What was asked, the device's profile with the sources of its values, the schemes and, of several parts, a choice.

    layers: the dense ones, empty without that part.
    """

    source: str
    model: ModelDims
    layers: tuple[int, ...]
    batch: int
    max_tokens: int | None
    tensor_parallel_size: int
    reduce_bytes: int
    device: dict[str, Any]
    notes: tuple[str, ...]
    schemes: tuple[SchemeEstimate, ...]
    chosen: tuple[Chosen, ...]

    @property
    def title(self) -> str:
        return safe_line(f"{self.source} on {self.device['name']}")

    @property
    def subtitle(self) -> str:
        count = len(self.layers)
        dense = f", {count} dense {'layer' if count == 1 else 'layers'}" if count else ""
        return (
            f"{self.model.shown}{dense}, {self.batch} tokens a rank and step"
            + (f" in {self.max_tokens} rows" if self.max_tokens is not None else "")
            + (f", tensor-parallel size {self.tensor_parallel_size}" if self.tensor_parallel_size > 1 else "")
        )
