"""The model's formulas: pure functions of a device profile and of sizes. All times are seconds.

T tokens that a rank brings, R tp_size, n bytes that each rank sends to each other one. Peaks times the profile's
efficiencies are the rates here.
"""

from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

from reshard.errors import ProfileError
from reshard.estimate.profile import Network, Profile

Number = Literal["bf16", "int8"]

_TERA, _GIGA, _MICRO = 1e12, 1e9, 1e-6
GIB, _MIB = 1 << 30, 1 << 20


@dataclass(frozen=True)
class Matmul:
    """[rows, inner] x [inner, columns]: its weights' type and bytes, and the bytes of activations in and out."""

    rows: int
    inner: int
    columns: int
    number: Number
    weight_bytes: int
    activation_bytes: int


def matmul_seconds(profile: Profile, work: Matmul) -> float:
    """max(2 * rows * inner * columns / rate, bytes / bandwidth) + static cost; without overlap, the sum of the two.

    The roofline (Williams, Waterman, Patterson, Communications of the ACM 52(4), 2009) with efficiencies and a cost
    for each call, as Ascend/msmodeling's analytic model has it. Weights come from memory each time: between two steps
    the rest of the model has gone through the cache. Activations come from it where they do not fit the cache.
    """
    peak = profile.compute.int8_tops if work.number == "int8" else profile.compute.bf16_tflops
    compute = 2 * work.rows * work.inner * work.columns / (peak * _TERA * profile.efficiency.compute)
    nbytes = work.weight_bytes + _uncached(profile, work.activation_bytes)
    memory = nbytes / _bandwidth(profile, work.number)
    work_seconds = max(compute, memory) if profile.compute.overlap else compute + memory
    return work_seconds + profile.static.matmul_us * _MICRO


def vector_seconds(profile: Profile, activation_bytes: int) -> float:
    """Bytes read and written / bandwidth, where they do not fit the cache, + static cost.

    Element-wise kernels (quantize, SwiGLU, copies) do a few operations a byte: their arithmetic is not counted.
    """
    return _uncached(profile, activation_bytes) / _bandwidth(profile, "bf16") + profile.static.vector_us * _MICRO


def collective_seconds(profile: Profile, ranks: int, nbytes: int, span: int | None = None) -> float:
    """all_gather of n bytes from each rank, or reduce_scatter of n bytes to each: data + latency + static cost.

    mesh:    n / (bandwidth / (devices - 1)) + latency. Each pair has its own link and all work at once, so it does not
             depend on R: a smaller group leaves links unused.
    switch:  (R - 1) * n / bandwidth + ceil(log2 R) * latency: recursive doubling or halving (Thakur, Rabenseifner,
             Gropp, International Journal of High Performance Computing Applications 19(1), 2005).

    span: devices side by side among which the ranks lie; None: as many as ranks.

    A group that spans nodes is taken to send all of its bytes at the outermost level's rate. A hierarchical algorithm
    would send fewer over it, so this is an upper bound there. Raises ProfileError where the network is too small.
    """
    if ranks == 1:
        return 0.0
    return _travel_seconds(profile, ranks, nbytes, span or ranks) + profile.static.collective_us * _MICRO


def all_reduce_seconds(profile: Profile, ranks: int, nbytes: int) -> float:
    """all_reduce of n bytes: reduce_scatter and all_gather of n / R bytes, in one call (Thakur et al., as above)."""
    if ranks == 1:
        return 0.0
    return 2 * _travel_seconds(profile, ranks, nbytes / ranks, ranks) + profile.static.collective_us * _MICRO


def _travel_seconds(profile: Profile, ranks: int, nbytes: float, span: int) -> float:
    _, level = level_for(profile, span)
    bandwidth = level.bandwidth_gb_s * _GIGA * profile.efficiency.communication
    if level.topology == "mesh" and level.devices is not None:  # which a mesh always has
        data, steps = nbytes / (bandwidth / (level.devices - 1)), 1
    else:
        data, steps = (ranks - 1) * nbytes / bandwidth, messages(profile, ranks, span)
    return data + steps * level.latency_us * _MICRO


def messages(profile: Profile, ranks: int, span: int | None = None) -> int:
    """How many messages a rank sends in a collective: in a mesh one to each other rank, all at once; over a switch
    one after another, ceil(log2 R).
    """
    _, level = level_for(profile, span or ranks)
    return ranks - 1 if level.topology == "mesh" else ceil(log2(ranks))


def level_for(profile: Profile, ranks: int) -> tuple[str, Network]:
    """The innermost level of the network that holds so many ranks, side by side. Raises ProfileError if none does."""
    for name, level in profile.network.items():
        if level.devices is None or ranks <= level.devices:
            return name, level
    *_, (name, last) = profile.network.items()
    raise ProfileError(f"{profile.name}: its network.{name} ends at {last.devices} devices, the group has {ranks}")


def _uncached(profile: Profile, nbytes: int) -> int:
    return nbytes if nbytes > profile.memory.cache_mib * _MIB else 0


def _bandwidth(profile: Profile, number: Number) -> float:
    share = profile.efficiency.memory_int8 if number == "int8" else profile.efficiency.memory_bf16
    return profile.memory.bandwidth_gib_s * GIB * share
