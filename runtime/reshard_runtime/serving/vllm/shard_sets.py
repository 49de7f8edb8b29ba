"""The shard sets that a model is served with: one, or one for each of several parts, in folders of the parts' names."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from reshard.errors import ShardError
from reshard.fit import absent_parts
from reshard.model.parts import DENSE_FFN
from reshard.source.weights import sets_within
from reshard_runtime.loader import StoredSet, one_set


@contextlib.contextmanager
def open_sets(folder: Path) -> Iterator[list[StoredSet]]:
    """All of them, each as `one_set` has it. Raises ManifestError, ShardError."""
    with contextlib.ExitStack() as held:
        sets, paths = [], _set_folders(folder)
        for path in paths:
            stored = held.enter_context(one_set(path))
            if path != folder and path.name != stored.manifest.part:
                raise ShardError(
                    f"{path}: holds the model's {stored.manifest.part}; name the folder {stored.manifest.part}"
                )
            sets.append(stored)
        if paths != [folder] and (line := absent_parts(str(folder), [stored.manifest for stored in sets])):
            raise ShardError(line)
        yield sets


def dense_of(sets: Sequence[StoredSet]) -> StoredSet | None:
    """The DenseFFN's."""
    return next((stored for stored in sets if stored.manifest.what is DENSE_FFN), None)


def digest_of(sets: Sequence[StoredSet]) -> str:
    """What tells them from any others."""
    return ", ".join(f"{stored.manifest.part} {stored.digest}" for stored in sets)


def _set_folders(folder: Path) -> list[Path]:
    try:
        entries = list(folder.iterdir())
    except OSError:
        return [folder]  # `one_set` says what is wrong
    files = [entry.name for entry in entries if not entry.is_dir()]
    within = sets_within(files, [entry.name for entry in entries if not entry.is_file()])
    return [folder / key for key in within] or [folder]
