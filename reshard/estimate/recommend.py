"""Which group size to choose, and why."""

from dataclasses import dataclass

from reshard.estimate.model import GIB
from reshard.estimate.profile import Profile
from reshard.estimate.sizes import Estimate, Size, fits_memory

_ALIKE = 1.02  # times this close to the shortest are alike, far within what the model knows
_IMPOSSIBLE = "no size can be cut and connected"
_FULL = "the dense layers alone do not fit the device's memory"


@dataclass(frozen=True)
class Recommendation:
    """A group size, or None where none of those asked for can be had, and why: a line each."""

    scheme: str
    tp_size: int | None
    reasons: tuple[str, ...]


def recommend(profile: Profile, found: Estimate) -> Recommendation:
    """The size with the shortest step; of sizes within 2 % of it, the one that holds the least.

    Left out: what the device's memory does not hold and, unless nothing else is left, what its tiles do not fit.
    """
    fitting = [size for size in found.sizes if fits_memory(profile, size)]
    aligned = [size for size in fitting if size.alignment.fits]
    if not fitting:
        return Recommendation(found.scheme, None, (_FULL if found.sizes else _IMPOSSIBLE,))
    candidates = aligned or fitting
    shortest = min(size.runs.step_seconds for size in candidates)
    best = min(
        (size for size in candidates if size.runs.step_seconds <= _ALIKE * shortest),
        key=lambda size: (size.held, size.tp_size),
    )
    reasons = [_gain(found.unsplit, best), *_neighbours(profile, found, best)]
    if not best.alignment.fits:
        reasons.append(best.alignment.notes[0])
    return Recommendation(found.scheme, best.tp_size, tuple(reasons))


def _gain(unsplit: Size, best: Size) -> str:
    before, after = unsplit.runs.step_seconds, best.runs.step_seconds
    if best.tp_size == 1:
        return f"no other size takes less than the {_ms(before)} unsplit"
    return (
        f"{_ms(after)} a step, {_ms(before)} unsplit; a device holds {best.held / GIB:.3f} GiB and saves "
        f"{best.saved / GIB:.3f}"
    )


def _neighbours(profile: Profile, found: Estimate, best: Size) -> list[str]:
    """What the next smaller and the next larger size would change."""
    said = []
    smaller = max((s for s in found.sizes if 1 < s.tp_size < best.tp_size), key=lambda s: s.tp_size, default=None)
    if smaller is not None and smaller.runs.step_seconds > best.runs.step_seconds:
        said.append(f"tp {smaller.tp_size} takes {_ms(smaller.runs.step_seconds)}: more weights to read")
    larger = min((s for s in found.sizes if s.tp_size > best.tp_size), key=lambda s: s.tp_size, default=None)
    if larger is None:
        return said
    text = f"tp {larger.tp_size} takes {_ms(larger.runs.step_seconds)}"
    if larger.network != best.network and best.tp_size > 1:
        inner, outer = profile.network[best.network], profile.network[larger.network]
        why = f"it leaves the {best.network} ({inner.bandwidth_gb_s:g} GB/s) for the {larger.network} "
        why += f"({outer.bandwidth_gb_s:g} GB/s, {outer.latency_us:g} us)"
    elif not larger.alignment.fits:
        why = larger.alignment.notes[0]
    else:
        why = "gather and scatter outweigh what is read less"
    return [*said, f"{text}: {why}"]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
