"""`reshard estimate`'s chart: a step's time by kind of work, as bars that need no colours."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from reshard.estimate.document import Estimate
    from reshard.estimate.step import Kind, Run

_CELLS, _FEWEST_CELLS = 60, 10
_COLOURS: "dict[Kind, str]" = {
    "matmul": "blue",
    "vector": "magenta",
    "gather": "yellow",
    "exchange": "green",
    "scatter": "red",
}
_GLYPHS, _ASCII = "█▓▒▚░", "#+=~-"
_MARK = " recommended"


def chart(found: "Estimate") -> "Iterator[Text]":
    """The chart's lines, as wide as a terminal allows; the recommended sizes are marked."""
    from rich.console import Console
    from rich.text import Text

    from reshard.estimate.svg import LABELS, kinds

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    glyphs = dict(zip(_COLOURS, _ASCII if console.options.ascii_only else _GLYPHS, strict=True))
    rows = [(one, size) for one in found.schemes for size in one.sizes]
    longest = max((size.runs.step_seconds for _, size in rows), default=1.0)
    wide = max(len(one.label) for one in found.schemes)
    label = wide + len(" tp 1234 ")
    cells = min(_CELLS, max(_FEWEST_CELLS, console.width - label - len(_time(longest) + _MARK)))
    for one, size in rows:
        line = Text(f"{one.label:<{wide}} tp {size.tp_size:<4} ")
        line.append_text(_bar(size.runs, cells / longest, glyphs)).append(_time(size.runs.step_seconds))
        yield line.append(_MARK if one.recommended == size.tp_size else "")
    entries = [Text.assemble((glyphs[kind], _COLOURS[kind]), f" {LABELS[kind]}") for kind in kinds(found)]
    legend = Text("  ").join(entries)
    indent = max(0, min(label, console.width - len(legend)))
    yield Text(" " * indent).append_text(legend) if len(legend) <= console.width else Text("\n").join(entries)


def _time(seconds: float) -> str:
    return f" {seconds * 1e3:.3f} ms"


def _bar(run: "Run", scale: float, glyphs: "dict[Kind, str]") -> "Text":
    """Cells by rounding the running sum, so that parts add up to the whole's length."""
    from rich.text import Text

    bar, done, total = Text(), 0, 0.0
    for kind, glyph in glyphs.items():
        total += run.seconds[kind]
        upto = round(total * scale)
        bar.append(glyph * (upto - done), _COLOURS[kind])
        done = upto
    return bar
