"""What a manifest says, changed value by value, and what every reader of its set then says."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from reshard.checkpoint.description import Checkpoint
from reshard.errors import ReshardError
from reshard.model.parts import DENSE_FFN
from reshard.source.open import describe, open_source
from reshard_runtime import load_shard, load_tensors
from tests.support.manifests import read_manifest, sealed
from tests.support.running import reshard


class Made(NamedTuple):
    """A checkpoint, and a set that was cut from it for 2."""

    source: Path
    shards: Path
    part: str = DENSE_FFN.key

    @property
    def load(self) -> Callable[..., object]:
        """What takes a rank's weights."""
        return load_shard if self.part == DENSE_FFN.key else load_tensors


def refusals(made: Made, shards: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """What each reader says of a set that none may take, one after the other."""
    tp = len(read_manifest(shards)["shards"])
    writes = {"merge": ("merge", shards), "re-cut": ("split", shards), "resume": ("split", made.source)}
    options = {"re-cut": ("--tp", 1), "resume": ("--tp", tp, "--resume", "--part", made.part)}
    for name in writes:
        out = shards if name == "resume" else folder / name
        before = {path.name: path.read_bytes() for path in shards.iterdir()}
        done = reshard(*writes[name], out, *options.get(name, ()), "--quiet")
        assert done.code == 1, name
        assert name == "resume" or not out.exists()
        assert {path.name: path.read_bytes() for path in shards.iterdir()} == before
        yield name, done.err
    for arguments, code in (
        (("inspect", shards), 1),
        (("estimate", shards, "--tp", 2), 1),
        (("check", shards), 3),
        (("verify", shards, "--quiet"), None),
        (("verify", shards, "--source", made.source, "--quiet"), None),
    ):
        done = reshard(*arguments)
        assert done.code == code or (code is None and done.code in (1, 3)), arguments
        yield str(arguments[0]), done.out + done.err
    for rank in range(tp):
        with pytest.raises(ReshardError) as caught:
            made.load(shards, rank)
        yield "load", str(caught.value)


FREE = {
    "generator.name", "generator.version",
    "source.kind", "source.name", "source.commit", "source.sample_blake3",
    "source.files.*.name", "source.files.*.size", "source.files.*.header_blake3",
    "shards.*.blake3", "shards.*.tensors.*.blake3",
}  # fmt: skip
"""Whence the weights come, which nothing but a source can tell, and the digests of shards: `verify` compares these with
the bytes, merge and re-cuts those of files before they take any. No weight depends on them."""


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not items:
        yield path
    else:
        for key, inner in items:
            yield from leaves(inner, (*path, key))


def some_leaves(manifest: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Of each kind the first, the middle and the last."""
    kinds: dict[str, list[tuple[Any, ...]]] = {}
    for path in leaves(manifest):
        kinds.setdefault(".".join("*" if isinstance(key, int) else key for key in path), []).append(path)
    for kind, paths in kinds.items():
        for at in sorted({0, len(paths) // 2, len(paths) - 1}):
            yield kind, paths[at]


OF_NONE: dict[str, Any] = {
    "block": [128, 128],
    "padding": {"padded_size": 1024, "multiple": 1},
    "conversion": {"rule": "cast_to_bf16", "inputs": []},
    "commit": "a" * 40,
    "limit": 2.0,
    "index": 0,
    "intermediate_size": 1024,
    "vocab_size": 4096,
    "activation": {"name": "silu", "limit": None},
    "attention_size": 512,
}


def others(key: Any, value: Any) -> list[Any]:
    """Other values of a leaf, of the type that it has."""
    if isinstance(value, int):
        return [value + 1, max(0, value - 1), value * 2 + 2]
    if isinstance(value, str):
        swapped = value.replace("gate", "down") if "gate" in value else value.replace("down", "up")
        return [value[::-1], *([swapped] if swapped != value else [])]
    return [OF_NONE[key]] if value is None else [[]] if value else []


def described(shards: Path) -> Checkpoint:
    with open_source(str(shards)) as source:
        return describe(source)


def no_value_is_believed(shards: Path, load: Callable[..., object]) -> None:
    """Change every kind of value in a set's manifest. load: of one rank, by `tp_rank`."""
    right = described(shards)
    manifest = read_manifest(shards)
    del manifest["blake3"]
    tried, taken = 0, set()
    for shape, path in some_leaves(manifest):
        *above, last = path
        for other in others(last, _at(manifest, path)):
            changed = copy.deepcopy(manifest)
            _at(changed, tuple(above))[last] = other
            if changed == manifest:
                continue
            tried += 1
            (shards / "manifest.json").write_bytes(sealed(changed))
            readers: tuple[Callable[[Path], object], ...] = (
                described,
                *(partial(load, tp_rank=rank) for rank in (0, 1)),
            )
            refused = [_refused(reader, shards) for reader in readers]
            if shape in FREE:
                assert not any(refused) or "source" in shape, path
                if not any(refused):
                    assert described(shards).layers == right.layers
                taken.add(shape)
            else:
                # A rank reads its own shard, and of the files beside it those that its weights depend on.
                few = path[0] == "files" or shape == "shards.*.size"
                assert all(refused[:1] if few else refused), (path, other, refused)
    assert taken <= FREE
    assert tried > 100


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _refused(read: Callable[[Path], object], shards: Path) -> bool:
    try:
        read(shards)
    except ReshardError:
        return True
    return False
