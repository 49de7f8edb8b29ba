"""Estimates of one scheme."""

from collections.abc import Iterable

from reshard.checkpoint.config_only import config_checkpoint, read_config
from reshard.checkpoint.description import Checkpoint
from reshard.estimate.document import SchemeEstimate
from reshard.estimate.profile import Profile, load_profile
from reshard.estimate.sizes import Options, Wanted, estimate
from reshard.estimate.step import Kind, Split, run
from reshard.schemes.table import Arithmetic
from tests.support.paths import CONFIGS

FLOAT, DYNAMIC, STATIC = Arithmetic.FLOAT, Arithmetic.DYNAMIC, Arithmetic.STATIC
A2, A3 = load_profile("atlas-a2-376t"), load_profile("atlas-a3-752t")
BY_HAND = load_profile("atlas-a2-376t", [f"network.node.latency_us={0.5 / 7}"])
"""With what the calculation by hand takes for a collective's messages: 0.5 us for the seven of a node."""
R1 = CONFIGS / "deepseek-r1.json"


def r1(scheme: str) -> Checkpoint:
    """DeepSeek-R1 by its config."""
    return config_checkpoint(read_config(R1), "deepseek-r1", scheme)


def estimated(
    checkpoint: Checkpoint, tp_sizes: Iterable[int], profile: Profile = A2, options: Options | None = None
) -> SchemeEstimate:
    """A checkpoint as it is, 24 tokens a rank."""
    (one,) = estimate([Wanted("it", checkpoint, sorted(tp_sizes))], profile, options or Options(24)).schemes
    return one


def layer_seconds(profile: Profile, split: Split) -> dict[Kind, float]:
    """One layer's, by kind of work."""
    return run(profile, [split]).seconds


def wire(profile: Profile, split: Split) -> tuple[int, int, int]:
    """Bytes gathered and scattered, and messages, for one layer."""
    found = run(profile, [split])
    return found.gather_bytes_per_layer, found.scatter_bytes_per_layer, found.messages_per_layer
