"""A cut: whether the sizes allow it."""

from reshard.checkpoint.description import Checkpoint
from reshard.checks.finding import Finding
from reshard.checks.report import not_checked
from reshard.errors import AlignmentError
from reshard.plan.plan import Plan, Ways, make_plan, required_multiple

_CHECKS = ("divides", "blocks")


def check_cut(checkpoint: Checkpoint, tp_size: int, pad: bool, ways: Ways) -> tuple[list[Finding], Plan | None]:
    """Findings and, if the cut can be made, the plan of rank 0; every rank's shapes are the same."""
    where = f"tp {tp_size}"
    name, size, block = checkpoint.part.size, checkpoint.shared_size, required_multiple(checkpoint.layers)
    whole = checkpoint.part.padded(size)
    divides = 1 <= tp_size <= whole and whole % tp_size == 0
    try:
        plan = make_plan(checkpoint, tp_size, pad=pad, tp_ranks=(0,), ways=ways)
    except AlignmentError as error:
        if not divides:
            return [Finding("divides", where, str(error)), *_skipped(where, "blocks", "see divides")], None
        return [
            Finding("divides", where, _share(whole, tp_size), "ok"),
            Finding("blocks", where, str(error)),
        ], None
    if plan.padding:
        padded = plan.padding.padded
        line = f"{name} {size} padded to {padded}, {_share(padded, tp_size)}"
        share = padded // tp_size
    else:
        line, share = _share(size, tp_size), size // tp_size
    blocks = f"{-(-share // block)} blocks of {block} a rank" if block > 1 else f"no scale blocks along {name}"
    return [Finding("divides", where, line, "ok"), Finding("blocks", where, blocks, "ok")], plan


def no_cut(why: str) -> list[Finding]:
    """Where there is no size to cut for, or nothing to cut."""
    return list(not_checked(_CHECKS, why))


def _share(size: int, tp_size: int) -> str:
    return f"{size} / {tp_size} = {size // tp_size}"


def _skipped(where: str, check: str, why: str) -> list[Finding]:
    return [Finding(check, where, f"not checked: {why}", "skipped")]
