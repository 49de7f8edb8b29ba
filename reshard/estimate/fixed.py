"""What it costs that every rank sends a fixed number of rows, whatever it has: against as many rows as tokens."""

from dataclasses import dataclass, replace

from reshard.checkpoint.description import Checkpoint
from reshard.estimate.profile import Profile
from reshard.estimate.sizes import Estimate, Gathered, Options, Size, estimate


@dataclass(frozen=True)
class Pass:
    """One way through the dense layers.

    rows: that a rank multiplies in a layer. gathered, scattered: bytes that it sends for the layer that sends the most.
    layer_seconds: the mean of the layers.
    """

    rows: int
    gathered: int
    scattered: int
    layer_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class FixedRows:
    """A group size with fixed rows, and with as many rows as tokens."""

    scheme: str
    tp_size: int
    fixed: Pass
    exact: Pass

    @property
    def unneeded(self) -> int:
        """Rows that are multiplied for nobody."""
        return self.fixed.rows - self.exact.rows


def fixed_rows(checkpoint: Checkpoint, found: Estimate, profile: Profile, options: Options) -> tuple[FixedRows, ...]:
    """What fixed rows cost, for every size whose ranks send rows; `found` is the estimate with `options`."""
    if options.max_tokens is None:
        return ()
    without = replace(options, max_tokens=None)
    exact = estimate(checkpoint, found.scheme, [size.tp_size for size in found.sizes], profile, without)
    layers = len(checkpoint.layers)
    return tuple(
        FixedRows(
            found.scheme,
            size.tp_size,
            _pass(size.runs, _senders(size, options) * options.max_tokens, layers),
            _pass(other.runs, _senders(size, options) * options.tokens, layers),
        )
        for size, other in zip(found.sizes, exact.sizes, strict=True)
        if _senders(size, options) > 1
    )


def _senders(size: Size, options: Options) -> int:
    return size.tp_size // options.tensor_parallel_size


def _pass(gathered: Gathered, rows: int, layers: int) -> Pass:
    step = gathered.step_seconds
    return Pass(rows, gathered.wire.gathered, gathered.wire.scattered, step / layers, step)
