"""Which group size to choose, and why: docs/estimate.md, "The recommendation"."""

from collections.abc import Sequence

from reshard.estimate.document import Chosen, SchemeEstimate, Size
from reshard.estimate.profile import GIB, Profile

_ALIKE = 1.02  # times this close to the shortest are alike, far within what the model knows


def recommend(profile: Profile, unsplit: Size, sizes: Sequence[Size]) -> tuple[int | None, list[str]]:
    """The size with the shortest step (of sizes within 2 % of it, the one that holds the least), and why, in lines.

    Left out: what the device's memory does not hold, what its int8 kernel refuses and, unless nothing else is left,
    what its tiles do not fit. The reasons name each size that takes less, and the next smaller and larger one.
    """
    refusals = {size.tp_size: refusal(profile, size) for size in sizes}
    possible = [size for size in sizes if refusals[size.tp_size] is None]
    if not possible:
        alike = len(set(refusals.values())) == 1
        lines = [str(why) if alike else f"tp {tp_size}: {why}" for tp_size, why in refusals.items()]
        return None, (lines[:1] if alike else lines) or ["no size can be cut and connected"]
    candidates = [size for size in possible if size.alignment.tiles is not False] or possible
    shortest = min(map(_time, candidates))
    best = min(
        (size for size in candidates if _time(size) <= _ALIKE * shortest),
        key=lambda size: (size.held_bytes, size.tp_size),
    )
    reasons = _gain(profile, unsplit, sizes, best)
    smaller = max((n for n in refusals if unsplit.tp_size < n < best.tp_size), default=None)
    larger = min((n for n in refusals if n > best.tp_size), default=None)
    reasons += [
        f"tp {size.tp_size} takes {_ms(_time(size))}{_why_not(profile, size, best)}"
        for size in sizes
        if _time(size) < _time(best) or size.tp_size in (smaller, larger)
    ]
    if best.alignment.tiles is False:
        reasons.append(best.alignment.notes[0])
    return best.tp_size, reasons


def choose(scheme: str, parts: Sequence[SchemeEstimate]) -> Chosen:
    """Every part at the size recommended for it where that takes less than the whole part, which stays whole else."""
    sizes, seconds, saved, others = {}, 0.0, 0, []
    for one in parts:
        best = next((size for size in one.sizes if size.tp_size == one.recommended), None)
        if best is not None and best.tp_size > 1 and _time(best) < one.unsplit_seconds:
            sizes[one.part] = best.tp_size
            seconds += one.unsplit_seconds - _time(best)
            saved += best.saved_bytes
        else:
            others.append(f"{one.part} whole: {_for_memory(one)}")
    return Chosen(scheme, sizes, seconds, saved, tuple(others))


def _for_memory(one: SchemeEstimate) -> str:
    """What splitting costs where it takes longer, at the size that costs the least time for the memory."""

    def cost(size: Size) -> float:
        return (_time(size) - one.unsplit_seconds) / size.saved_bytes

    split = [size for size in one.sizes if size.saved_bytes > 0]
    if not split:
        return one.reasons[0]
    size = min(split, key=cost)
    more, saved = _time(size) - one.unsplit_seconds, size.saved_bytes / GIB
    return f"tp {size.tp_size} takes {_ms(more)} more and saves {saved:.3f} GiB, {_ms(cost(size) * GIB)} a GiB"


def refusal(profile: Profile, size: Size) -> str | None:
    """Why the device cannot run it at all."""
    if size.held_bytes > profile.memory.capacity_gib * GIB:
        return "these layers alone do not fit the device's memory"
    return size.alignment.notes[-1] if size.alignment.too_wide else None


def _gain(profile: Profile, unsplit: Size, sizes: Sequence[Size], best: Size) -> list[str]:
    base = unsplit.tp_size
    before = f"{_ms(_time(unsplit))} {'unsplit' if base == 1 else f'at tp {base}'}"
    if best.tp_size == base:
        if len(sizes) == 1:
            return [f"{before}; there is no other size to compare with"]
        least = all(_time(size) >= _time(best) for size in sizes)
        return [f"no other size takes less than the {before}" if least else before]
    gain = [
        f"{_ms(_time(best))} a step, {before}; a device holds {best.held_bytes / GIB:.3f} GiB and saves "
        f"{best.saved_bytes / GIB:.3f}"
    ]
    asked = any(size.tp_size == base for size in sizes)
    if not asked and _time(unsplit) < _time(best) and refusal(profile, unsplit) is None:
        gain.append(f"{'unsplit' if base == 1 else f'tp {base}'} takes less: this saves memory, not time")
    return gain


def _why_not(profile: Profile, size: Size, best: Size) -> str:
    why = refusal(profile, size)
    if why is not None:
        return f": {why}"
    if _time(size) >= _time(best):
        return f": {_what_takes_longer(profile, size, best)}"
    if best.alignment.tiles is not False and size.alignment.tiles is False:
        return f": {size.alignment.notes[0]}"
    return f", which is alike, and holds {size.held_bytes / GIB:.3f} GiB"


def _what_takes_longer(profile: Profile, size: Size, best: Size) -> str:
    """The kind of work that adds the most to the better size's time."""
    more = {kind: seconds - best.runs.seconds[kind] for kind, seconds in size.runs.seconds.items()}
    collectives = more["gather"] + more["exchange"] + more["scatter"]
    if collectives >= max(more["matmul"], more["vector"]):
        said = f"{'collectives' if more['exchange'] else 'gather and scatter'} take {_ms(collectives)} more"
        if size.network == best.network or best.tp_size == 1:
            return said
        outer, inner = (
            f"the {name} ({profile.network[name].bandwidth_gb_s:g} GB/s, {profile.network[name].latency_us:g} us)"
            for name in (size.network, best.network)
        )
        return f"{said}, over {outer} and not {inner}"
    if more["vector"] > more["matmul"]:
        return f"quantizing, SwiGLU and copies take {_ms(more['vector'])} more"
    said = f"matmuls take {_ms(more['matmul'])} more"
    return f"{said}, with more weights to read" if size.held_bytes > best.held_bytes else said


def _time(size: Size) -> float:
    return size.runs.step_seconds


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
