"""`reshard estimate`'s chart: a step's time by kind of work, as bars that need no colours."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from reshard.estimate.sizes import Estimate, Size
    from reshard.estimate.step import Kind

_CELLS, _FEWEST_CELLS = 60, 10
_COLOURS: "dict[Kind, str]" = {"matmul": "blue", "vector": "magenta", "gather": "yellow", "scatter": "red"}
_GLYPHS, _ASCII = "█▓▒░", "#+=-"
_MARK = " recommended"


def show_chart(found: "Sequence[Estimate]", best: "dict[str, int | None]") -> None:
    """Print the chart to stdout, as wide as a terminal allows; the recommended sizes are marked."""
    from rich.console import Console
    from rich.text import Text

    from reshard.estimate.svg import LABELS

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    glyphs = dict(zip(_COLOURS, _ASCII if console.options.ascii_only else _GLYPHS, strict=True))
    longest = max((size.runs.step_seconds for one in found for size in one.sizes), default=1.0)
    wide = max((len(one.scheme) for one in found), default=0)
    label = wide + len(" tp 1234 ")
    cells = min(_CELLS, max(_FEWEST_CELLS, console.width - label - len(_time(longest) + _MARK)))
    for one in found:
        for size in one.sizes:
            mark = _MARK if best[one.scheme] == size.tp_size else ""
            line = Text(f"{one.scheme:<{wide}} tp {size.tp_size:<4} ")
            line.append_text(_bar(size, longest, cells, glyphs)).append(_time(size.runs.step_seconds) + mark)
            console.print(line, soft_wrap=True)
    entries = [Text.assemble((glyph, _COLOURS[kind]), f" {LABELS[kind]}") for kind, glyph in glyphs.items()]
    legend = Text("  ").join(entries)
    indent = max(0, min(label, console.width - len(legend)))
    console.print(Text(" " * indent).append_text(legend) if len(legend) <= console.width else Text("\n").join(entries))


def _time(seconds: float) -> str:
    return f" {seconds * 1e3:.3f} ms"


def _bar(size: "Size", longest: float, cells: int, glyphs: "dict[Kind, str]") -> "Text":
    """Cells by rounding the running sum, so that parts add up to the whole's length."""
    from rich.text import Text

    bar, done, total = Text(), 0, 0.0
    for kind, glyph in glyphs.items():
        total += size.runs.seconds[kind]
        upto = round(total / longest * cells)
        bar.append(glyph * (upto - done), _COLOURS[kind])
        done = upto
    return bar
