"""`reshard estimate`'s chart: a step's time by kind of work, as bars that need no colours."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from reshard.estimate.sizes import Estimate, Size
    from reshard.estimate.step import Kind

_CELLS = 60
_STYLES: "dict[Kind, tuple[str, str]]" = {
    "matmul": ("█", "blue"),
    "vector": ("▓", "magenta"),
    "gather": ("▒", "yellow"),
    "scatter": ("░", "red"),
}


def show_chart(found: "Sequence[Estimate]", best: "dict[str, int | None]") -> None:
    """Print the chart to stdout; the recommended sizes are marked."""
    from rich.console import Console
    from rich.text import Text

    from reshard.estimate.svg import LABELS

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    longest = max((size.runs.step_seconds for one in found for size in one.sizes), default=1.0)
    wide = max((len(one.scheme) for one in found), default=0)
    for one in found:
        for size in one.sizes:
            mark = " recommended" if best[one.scheme] == size.tp_size else ""
            line = Text(f"{one.scheme:<{wide}} tp {size.tp_size:<4} ")
            line.append_text(_bar(size, longest))
            line.append(f" {size.runs.step_seconds * 1e3:.3f} ms{mark}")
            console.print(line)
    legend = Text(" " * (wide + 9))
    for kind, (glyph, style) in _STYLES.items():
        legend.append(glyph, style).append(f" {LABELS[kind]}  ")
    console.print(legend)


def _bar(size: "Size", longest: float) -> "Text":
    """Cells by rounding the running sum, so that parts add up to the whole's length."""
    from rich.text import Text

    bar, done, total = Text(), 0, 0.0
    for kind, (glyph, style) in _STYLES.items():
        total += size.runs.seconds[kind]
        upto = round(total / longest * _CELLS)
        bar.append(glyph * (upto - done), style)
        done = upto
    return bar
