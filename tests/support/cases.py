"""All bad inputs, and what they are made into."""

from pathlib import Path

from reshard.checkpoint.description import Checkpoint
from reshard.plan.pipeline import Cut, check_set_digests, prepare
from reshard.source.open import open_source
from reshard.writer.split import SplitOptions, write_shards
from tests.support import cases_contents, cases_files, cases_sets
from tests.support.builders import build
from tests.support.corrupt import Case

CASES = [*cases_files.CASES, *cases_contents.CASES, *cases_sets.CASES]


def split_thoroughly(source: Path, out: Path, cut: Cut) -> Checkpoint:
    """What `reshard split` does."""
    with open_source(str(source)) as opened:
        prepared = prepare(opened, cut)
        check_set_digests(opened, workers=2)
        write_shards(prepared, out, SplitOptions(workers=2))
        return prepared.checkpoint


def bad_source(case: Case, folder: Path) -> Path:
    """The case's checkpoint or shard set, damaged."""
    source = folder / "model"
    build(source, case.spec)
    if case.cut:
        split_thoroughly(source, folder / "set", Cut(2))
        source = folder / "set"
    case.damage(source)
    return source


def listing(folder: Path) -> dict[Path, int]:
    """Every path in a folder with its size."""
    return {path: path.lstat().st_size for path in folder.rglob("*")}
