"""Manifests that were changed: with their own digest made right again, so that what they say is what is tested."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.seal import reseal

MANIFEST = "manifest.json"
Change = Callable[[dict[str, Any]], object]


def sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest's bytes, its digest in it."""
    return reseal(json.dumps({**manifest, "blake3": "0" * 64}, indent=1).encode())


def read_manifest(shards: Path) -> dict[str, Any]:
    manifest = json.loads((shards / MANIFEST).read_bytes())
    assert isinstance(manifest, dict)
    return manifest


def edit_manifest(shards: Path, change: Change) -> None:
    """A set's manifest, changed in place."""
    manifest = read_manifest(shards)
    change(manifest)
    (shards / MANIFEST).write_bytes(sealed(manifest))


def tensor(manifest: dict[str, Any], rank: int, name: str) -> dict[str, Any]:
    """The entry of layer 0's tensor of that name in a rank's shard."""
    found: list[dict[str, Any]] = manifest["shards"][rank]["tensors"]
    return next(entry for entry in found if entry["name"] == f"model.layers.0.mlp.{name}")
