"""What a folder's checkpoint is refused with, or warned of."""

from pathlib import Path

from reshard.source.open import describe, open_source
from tests.support.running import reshard


def warnings_of(model: Path) -> tuple[str, ...]:
    with open_source(str(model)) as source:
        return describe(source).warnings


def refusal(model: Path, command: str = "check") -> str:
    """The one line of a checkpoint that cannot be read."""
    line = {"check": ("check", model, "--tp", 2), "split": ("split", model, model.parent / "out", "--tp", 2)}
    done = reshard(*line[command])
    assert done.code == 1
    assert len(done.err.strip().splitlines()) == 1
    assert not (model.parent / "out").exists()
    return done.err


def broken_link(path: Path, target: str = "../blobs/gone") -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)
