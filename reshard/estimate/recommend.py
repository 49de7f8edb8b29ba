"""Which group size to choose, and why."""

from collections.abc import Sequence
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

    Left out: what the device's memory does not hold, what its int8 kernel refuses and, unless nothing else is left,
    what its tiles do not fit. The reasons name each size that takes less, and the next smaller and larger one.
    """
    possible = [size for size in found.sizes if _refusal(profile, size) is None]
    if not possible:
        return Recommendation(found.scheme, None, _why_none(profile, found.sizes))
    candidates = [size for size in possible if size.alignment.tiles is not False] or possible
    shortest = min(size.runs.step_seconds for size in candidates)
    best = min(
        (size for size in candidates if size.runs.step_seconds <= _ALIKE * shortest),
        key=lambda size: (size.held, size.tp_size),
    )
    reasons = [*_gain(profile, found, best), *(_why_not(profile, size, best) for size in _others(found, best))]
    return Recommendation(found.scheme, best.tp_size, (*reasons, *best.alignment.padding[:1]))


def _refusal(profile: Profile, size: Size) -> str | None:
    """Why the device cannot run it at all."""
    return size.alignment.too_wide if fits_memory(profile, size) else _FULL


def _why_none(profile: Profile, sizes: Sequence[Size]) -> tuple[str, ...]:
    refusals = {size.tp_size: _refusal(profile, size) for size in sizes}
    if len(set(refusals.values())) > 1:
        return tuple(f"tp {tp_size}: {why}" for tp_size, why in refusals.items())
    return tuple(why for why in refusals.values() if why)[:1] or (_IMPOSSIBLE,)


def _gain(profile: Profile, found: Estimate, best: Size) -> list[str]:
    before, after = found.unsplit.runs.step_seconds, best.runs.step_seconds
    base = found.unsplit.tp_size
    without = "unsplit" if base == 1 else f"at tp {base}"
    if best.tp_size == base:
        if len(found.sizes) == 1:
            return [f"{_ms(before)} {without}; there is no other size to compare with"]
        if any(_takes_less(size, best) for size in found.sizes):
            return [f"{_ms(before)} {without}"]
        return [f"no other size takes less than the {_ms(before)} {without}"]
    said = (
        f"{_ms(after)} a step, {_ms(before)} {without}; a device holds {best.held / GIB:.3f} GiB and saves "
        f"{best.saved / GIB:.3f}"
    )
    asked = any(size.tp_size == base for size in found.sizes)
    if not asked and _takes_less(found.unsplit, best) and _refusal(profile, found.unsplit) is None:
        return [said, f"{'unsplit' if base == 1 else f'tp {base}'} takes less: this saves memory, not time"]
    return [said]


def _takes_less(size: Size, best: Size) -> bool:
    return size.runs.step_seconds < best.runs.step_seconds


def _others(found: Estimate, best: Size) -> list[Size]:
    """What takes less, the next smaller group and the next larger one."""
    base = found.unsplit.tp_size
    smaller = max((size.tp_size for size in found.sizes if base < size.tp_size < best.tp_size), default=None)
    larger = min((size.tp_size for size in found.sizes if size.tp_size > best.tp_size), default=None)
    return [size for size in found.sizes if _takes_less(size, best) or size.tp_size in (smaller, larger)]


def _why_not(profile: Profile, size: Size, best: Size) -> str:
    text = f"tp {size.tp_size} takes {_ms(size.runs.step_seconds)}"
    refusal = _refusal(profile, size)
    if refusal is not None:
        return f"{text}: {refusal}"
    if not _takes_less(size, best):
        return f"{text}: {_what_takes_longer(profile, size, best)}"
    if best.alignment.tiles is not False and size.alignment.tiles is False:
        return f"{text}: {size.alignment.padding[0]}"
    return f"{text}, which is alike, and holds {size.held / GIB:.3f} GiB"


def _what_takes_longer(profile: Profile, size: Size, best: Size) -> str:
    """The kind of work that adds the most to the better size's time."""
    more = {kind: seconds - best.runs.seconds[kind] for kind, seconds in size.runs.seconds.items()}
    collectives = more["gather"] + more["scatter"]
    if collectives >= max(more["matmul"], more["vector"]):
        said = f"gather and scatter take {_ms(collectives)} more"
        if size.network == best.network or best.tp_size == 1:
            return said
        inner, outer = profile.network[best.network], profile.network[size.network]
        return (
            f"{said}, over the {size.network} ({outer.bandwidth_gb_s:g} GB/s, {outer.latency_us:g} us) and not the "
            f"{best.network} ({inner.bandwidth_gb_s:g} GB/s, {inner.latency_us:g} us)"
        )
    if more["vector"] > more["matmul"]:
        return f"quantizing, SwiGLU and copies take {_ms(more['vector'])} more"
    said = f"matmuls take {_ms(more['matmul'])} more"
    return f"{said}, with more weights to read" if size.held > best.held else said


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
