"""The estimate as a picture: a step's time by kind of work, and what a device holds, a bar for each group size."""

from collections.abc import Iterator, Sequence
from html import escape

from reshard.estimate.document import Estimate, Size
from reshard.estimate.profile import GIB
from reshard.estimate.step import Kind

LABELS: dict[Kind, str] = {
    "matmul": "matmuls",
    "vector": "quantize, SwiGLU, copies",
    "gather": "all_gather",
    "exchange": "all_to_all",
    "scatter": "reduce_scatter",
}
_COLOURS: dict[Kind, str] = {
    "matmul": "#2563eb",
    "vector": "#7c3aed",
    "gather": "#d97706",
    "exchange": "#15803d",
    "scatter": "#b91c1c",
}
_HELD, _SAVED = "#0f766e", "#99f6e4"
_INK, _SOFT, _LINE = "#111827", "#6b7280", "#e5e7eb"
_WIDTH, _LEFT, _TIME, _MEMORY, _MEMORY_AT = 980, 96, 380, 190, 690  # pixels: bars' starts and greatest lengths
_ROW, _BAR, _TOP, _GROUP = 30, 18, 92, 46


def picture(found: Estimate) -> str:
    """An SVG document; the recommended size of each scheme is marked."""
    schemes = [one for one in found.schemes if one.sizes]
    rows = sum(len(one.sizes) for one in schemes)
    dense = all(one.label == one.scheme for one in schemes)
    height = _TOP + len(schemes) * _GROUP + rows * _ROW + 62
    longest = max((size.runs.step_seconds for one in schemes for size in one.sizes), default=1.0)
    largest = max((one.unsplit_bytes for one in schemes), default=1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-size="14" '
        f'font-family="ui-sans-serif, Helvetica, Arial, sans-serif" role="img" aria-label="{escape(found.title)}">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(24, 32, found.title, size=18, weight=600),
        _text(24, 54, found.subtitle, colour=_SOFT, size=13),
        _text(_LEFT, 84, f"milliseconds a decode step{', all dense layers' if dense else ''}", weight=600, size=13),
        _text(_MEMORY_AT, 84, f"GiB{' of dense layers' if dense else ''} on a device", weight=600, size=13),
    ]
    at = _TOP
    for one in schemes:
        parts.append(_text(24, at + 26, one.label, weight=600))
        parts.append(f'<path d="M24 {at + 36} H{_WIDTH - 24}" stroke="{_LINE}"/>')
        at += _GROUP
        for size in one.sizes:
            parts += _row(size, at, longest, largest, marked=one.recommended == size.tp_size)
            at += _ROW
    return "\n".join([*parts, *_legend(at + 34, kinds(found)), "</svg>"]) + "\n"


def kinds(found: Estimate) -> list[Kind]:
    """Of work, for the legend: the DenseFFN exchanges nothing."""
    runs = [size.runs for one in found.schemes for size in one.sizes]
    return [kind for kind in LABELS if kind != "exchange" or any(run.seconds[kind] for run in runs)]


def _row(size: Size, at: int, longest: float, largest: int, *, marked: bool) -> Iterator[str]:
    middle, weight = at + _BAR // 2 + 5, 600 if marked else 400
    yield _text(_LEFT - 12, middle, f"tp {size.tp_size}", anchor="end", weight=weight)
    x = float(_LEFT)
    for kind, colour in _COLOURS.items():
        width = size.runs.seconds[kind] / longest * _TIME
        if width > 0:
            yield _rect(f"{x:.1f}", at, width, colour)
        x += width
    yield _text(x + 8, middle, f"{size.runs.step_seconds * 1e3:.3f}{' recommended' if marked else ''}", weight=weight)
    held, saved = size.held_bytes / largest * _MEMORY, max(0, size.saved_bytes) / largest * _MEMORY
    yield _rect(str(_MEMORY_AT), at, held, _HELD)
    if saved:
        yield _rect(f"{_MEMORY_AT + held:.1f}", at, saved, _SAVED)
    yield _text(_MEMORY_AT + held + saved + 8, middle, f"{size.held_bytes / GIB:.3f}", weight=weight)


def _legend(at: int, shown: Sequence[Kind]) -> Iterator[str]:
    x = _LEFT
    for kind in shown:
        yield _swatch(x, at, _COLOURS[kind], LABELS[kind])
        x += 44 + round(6.1 * len(LABELS[kind]))
    yield _swatch(_MEMORY_AT, at, _HELD, "held")
    yield _swatch(_MEMORY_AT + 66, at, _SAVED, "saved")


def _rect(x: str, y: int, width: float, colour: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}"/>'


def _swatch(x: int, y: int, colour: str, label: str) -> str:
    box = f'<rect x="{x}" y="{y - 11}" width="12" height="12" fill="{colour}"/>'
    return box + _text(x + 18, y, label, colour=_SOFT, size=12)


def _text(
    x: float, y: float, text: str, *, colour: str = _INK, size: int = 14, weight: int = 400, anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )
