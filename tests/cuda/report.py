"""What was found: checks with how far off they were, figures, and how both are shown."""

import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch


@dataclass(frozen=True)
class Check:
    """A check. `off`: the largest error of any of its values, as a share of what is allowed; exact ones have 0."""

    name: str
    off: float

    @property
    def ok(self) -> bool:
        return self.off <= 1  # NaN is not


@dataclass
class Report:
    """All of a run. figures: by what was measured, rows of the same keys."""

    machine: dict[str, str]
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def add(self, title: str, checks: Iterable[Check]) -> None:
        """Take them as they come. What raises is a check that failed, and ends this part alone."""
        with self._part(title):
            for check in checks:
                self._take(check)

    def figure(self, title: str, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows to those that are measured alike."""
        with self._part(title):
            for row in rows:
                self.figures.setdefault(title, []).append(row)

    def _take(self, check: Check) -> None:
        self.checks.append(check)
        if not check.ok:
            print(f"WRONG: {check.name}", file=sys.stderr, flush=True)

    @contextmanager
    def _part(self, title: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self._take(Check(f"{title}: raised {type(error).__name__}: {str(error).splitlines()[:1]}", torch.inf))
        print(f"{title}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)

    def document(self) -> dict[str, Any]:
        checks = [
            {"name": check.name, "ok": check.ok, "off": check.off if isfinite(check.off) else None}
            for check in self.checks
        ]
        return {
            "machine": self.machine,
            "ok": self.ok,
            "checks": checks,
            "figures": self.figures,
            "seconds": self.seconds,
        }

    def lines(self) -> Iterable[str]:
        yield ", ".join(f"{key} {value}" for key, value in self.machine.items())
        for title, rows in self.figures.items():
            yield ""
            yield from _table(title, rows)
        yield ""
        wrong = [f"WRONG: {check.name}: {check.off:.3g} times what is allowed" for check in self.checks if not check.ok]
        yield from wrong
        yield f"{len(self.checks)} checks, {len(wrong) or 'none'} wrong, in {self.seconds:.0f} s"


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    keys = list(rows[0])
    cells = [keys, *([_shown(row[key]) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    yield title
    for line in cells:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def exact(name: str, found: torch.Tensor, wanted: torch.Tensor) -> Check:
    """Bit for bit, any NaN equal to any."""
    found = found.to(wanted.device)
    alike = found.dtype == wanted.dtype and found.shape == wanted.shape
    same = alike and torch.equal(found.nan_to_num(nan=7.5), wanted.nan_to_num(nan=7.5))
    return Check(f"{name}: the same bits", 0.0 if same and torch.equal(found.isnan(), wanted.isnan()) else torch.inf)


def near(name: str, found: torch.Tensor, wanted: torch.Tensor, relative: float, of_norm: float) -> Check:
    """Each value to `relative` of itself and `of_norm` of the root mean square of all."""
    if found.shape != wanted.shape or not bool(torch.isfinite(found).all()):
        return Check(f"{name}: {list(found.shape)}, finite", torch.inf)
    wanted = wanted.to(found.device).double()
    allowed = relative * wanted.abs() + of_norm * wanted.square().mean().sqrt()
    return Check(
        f"{name}: to {relative:.1e}, {of_norm:.1e} of the rms", float(((found - wanted).abs() / allowed).max())
    )


def alike(name: str, found: torch.Tensor, wanted: torch.Tensor, of_norm: float) -> Check:
    """All values together: the norm of the difference to a share of the norm."""
    off = float((found - wanted).double().norm() / wanted.double().norm() / of_norm)
    return Check(f"{name}: to {of_norm:.1e} of the norm", off)


def levels(name: str, found: torch.Tensor, wanted: torch.Tensor, share: float) -> Check:
    """int8 levels: none off by more than one, and of those no more than `share`."""
    off = (found.to(wanted.device).int() - wanted.int()).abs()
    most = torch.inf if int(off.max()) > 1 else float((off > 0).float().mean()) / share
    return Check(f"{name}: levels off by at most one, of {share:.0e} of them", most)
