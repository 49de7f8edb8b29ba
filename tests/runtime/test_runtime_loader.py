"""Loading a rank's shard: the right bits, no other file, and a refusal for whatever is not what the manifest says."""

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard.errors import ManifestError, MissingDependencyError, ReshardError, ShardError, UsageError
from reshard.model.naming import shard_file
from reshard.plan.pipeline import Cut
from reshard_runtime import Shard, load_shard
from tests.support.builders import RECIPES, Raw, Spec, build, read_safetensors, write_safetensors
from tests.support.manifests import edit_manifest
from tests.support.running import reshard, split

HIDDEN, INTERMEDIATE = 256, 512
FOR_THE_CPU = {"bf16", "w8a8_dynamic", "w8a8_static", "w8a8_mix"}
DEQUANTIZED = {name for name, recipe in RECIPES.items() if recipe.scheme not in FOR_THE_CPU}
_STORAGE = {"I8": np.int8, "F8_E4M3": np.uint8, "BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "I32": np.int32}


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _array(raw: Raw) -> np.ndarray:
    dtype, shape, data = raw
    return np.frombuffer(data, _STORAGE.get(dtype, np.int64)).reshape(shape)


def _wanted(tensors: dict[str, Raw], layer: int, module: str, suffix: str, rank: int, size: int) -> np.ndarray:
    """A shard tensor's bits, straight from the source's."""

    def of(role: str) -> np.ndarray:
        return _array(tensors[f"model.layers.{layer}.mlp.{role}.{suffix}"])

    if module == "gate_up_proj":
        gate, up = of("gate_proj"), of("up_proj")
        return gate if gate.size == 1 else np.concatenate([np.split(gate, size)[rank], np.split(up, size)[rank]])
    down = of("down_proj")
    if suffix == "quant_bias":
        return down if rank == 0 else np.zeros_like(down)
    by_columns = suffix in {"weight", "weight_scale_inv"} or (down.ndim == 2 and down.shape[1] > 1)
    return np.split(down, size, axis=1)[rank] if by_columns else down


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("recipe", sorted(RECIPES.keys() - DEQUANTIZED))
def test_every_bit_is_the_source_s(tmp_path: Path, recipe: str, layout: str, size: int) -> None:
    tensors = build(tmp_path / "model", Spec(recipe, HIDDEN, INTERMEDIATE))
    split(tmp_path / "model", tmp_path / "shards", Cut(size, layout=layout))
    for rank in range(size):
        shard = load_shard(tmp_path / "shards", rank, verify="digest", tp_size=size)
        assert (list(shard.layers), shard.tp_rank, shard.tp_size) == ([0, 1], rank, size)
        for index, layer in shard.layers.items():
            assert (layer.share, layer.hidden_size, layer.intermediate_size) == (
                INTERMEDIATE // size,
                HIDDEN,
                INTERMEDIATE,
            )
            for linear in (layer.gate_up, layer.down):
                assert linear.tensors.keys() == RECIPES[recipe].tensors.keys()
                for suffix, tensor in linear.tensors.items():
                    wanted = _wanted(tensors, index, linear.name.split(".")[-1], suffix, rank, size)
                    assert _bits(tensor) == wanted.tobytes(), f"{linear.name}.{suffix}"
                    assert tuple(tensor.shape) == wanted.shape


@pytest.mark.parametrize("recipe", sorted(DEQUANTIZED))
def test_weights_without_a_kernel_are_named_once(tmp_path: Path, recipe: str, caplog: pytest.LogCaptureFixture) -> None:
    """Their values: tests/schemes."""
    build(tmp_path / "model", Spec(recipe, HIDDEN, INTERMEDIATE))
    split(tmp_path / "model", tmp_path / "shards", Cut(2))
    with caplog.at_level(logging.WARNING):
        shard = load_shard(tmp_path / "shards", 1)
    (said,) = caplog.messages
    assert said.startswith(f"cpu has no kernel for {RECIPES[recipe].scheme}: 4 linears are held as BF16, 0.00")
    linears = [linear for layer in shard.layers.values() for linear in (layer.gate_up, layer.down)]
    assert {(linear.scheme, *linear.tensors) for linear in linears} == {("bf16", "weight")}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A set for two ranks."""
    build(tmp_path / "model", Spec("modelslim_dynamic", HIDDEN, INTERMEDIATE))
    split(tmp_path / "model", tmp_path / "shards", Cut(2))
    return tmp_path / "shards"


def test_of_the_shards_only_the_rank_s_own_is_opened(shards: Path) -> None:
    (shards / shard_file(0, 2)).unlink()
    code = (
        "import sys; from reshard_runtime import load_shard; opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        f"load_shard({str(shards)!r}, 1, verify='digest')\n"
        f"print(*sorted({{name.rsplit('/', 1)[1] for name in opened if name.startswith({str(shards)!r})}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["config.json", shard_file(1, 2), "manifest.json"]


def test_layers_can_be_chosen(shards: Path) -> None:
    shard = load_shard(shards, 0, layers=[1])
    assert list(shard.layers) == [1]
    with pytest.raises(ShardError, match=r"it has no layer 0, its dense layers are 1$"):
        shard.layer(0)


def test_a_foreign_shard_of_the_same_shape_is_told_by_its_digests(tmp_path: Path, shards: Path) -> None:
    build(tmp_path / "another", Spec("modelslim_dynamic", HIDDEN, INTERMEDIATE, seed=1))
    split(tmp_path / "another", tmp_path / "others", Cut(2))
    shutil.copy(tmp_path / "others" / shard_file(1, 2), shards / shard_file(1, 2))
    load_shard(shards, 1)  # its header is the same, byte for byte
    with pytest.raises(ShardError, match=r"gate_up_proj.weight: BLAKE3 is .{64}, manifest.json says"):
        load_shard(shards, 1, verify="digest")


def test_one_bit_is_told_by_the_digest(shards: Path) -> None:
    path = shards / shard_file(1, 2)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    _write(path, bytes(raw))
    with pytest.raises(ShardError, match="BLAKE3 is"):
        load_shard(shards, 1, verify="digest")
    load_shard(shards, 0, verify="digest")


def _write(path: Path, raw: bytes) -> None:
    path.unlink()
    path.write_bytes(raw)


def _edit(shards: Path, change: Callable[[dict[str, Raw]], object], metadata: dict[str, str] | None = None) -> None:
    """Rank 1's file, and the size that the manifest says."""
    path = shards / shard_file(1, 2)
    tensors = read_safetensors(path)
    change(tensors)
    path.unlink()
    write_safetensors(path, tensors, metadata or {"format": "pt", "denseffn": "shard", "tp_rank": "1", "tp_size": "2"})
    _size(shards)


def _rewrite(shards: Path, change: Callable[[Any], None]) -> None:
    (shards / "manifest.json").chmod(0o600)
    edit_manifest(shards, change)


def _size(shards: Path) -> None:
    """The manifest says the size that the edited file has."""
    size = (shards / shard_file(1, 2)).stat().st_size
    _rewrite(shards, lambda d: d["shards"][1].update(size=size))


def _a_folder(shards: Path) -> None:
    (shards / shard_file(1, 2)).unlink()
    (shards / shard_file(1, 2)).mkdir()


W = "model.layers.0.mlp.down_proj.weight"
# What is done to the set, what is asked of load_shard, what it says.
DAMAGE: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "rank -1": (lambda s: None, {"tp_rank": -1}, r"tp_rank is -1; the set has ranks 0 to 1"),
    "rank 2": (lambda s: None, {"tp_rank": 2}, r"tp_rank is 2; the set has ranks 0 to 1"),
    "rank True": (lambda s: None, {"tp_rank": True}, r"tp_rank is True; the set has ranks 0 to 1"),
    "rank '1'": (lambda s: None, {"tp_rank": "1"}, r"tp_rank is '1'; the set has ranks 0 to 1"),
    "size": (lambda s: None, {"tp_size": 4}, r"cut for tp_size 2, the group's size is 4; cut it again with .* --tp 4"),
    "layer": (lambda s: None, {"layers": [0, 7]}, r"it has no layer 7, its dense layers are 0, 1"),
    "verify": (lambda s: None, {"verify": "sha"}, r"verify is 'sha'; it may be 'header' or 'digest'"),
    "no folder": (shutil.rmtree, {}, r"no manifest.json \(no folder\)"),
    "no manifest": (lambda s: (s / "manifest.json").unlink(), {}, r"no manifest.json \(the shard set is incomplete"),
    "version": (lambda s: _rewrite(s, lambda d: d.update(schema="denseffn-shards/9")), {}, r"'denseffn-shards/9'"),
    "field": (lambda s: _rewrite(s, lambda d: d.update(more=1)), {}, r"more: Extra inputs"),
    "no shares": (lambda s: _rewrite(s, lambda d: d["model"].update(intermediate_size=511)), {}, "is 511, .* 512"),
    "sizes": (
        lambda s: _rewrite(s, lambda d: d["model"].update(hidden_size=128)), {},
        r"hidden_size is 128, its tensors and config.json make it 256",
    ),
    "missing layer": (
        lambda s: _rewrite(s, lambda d: d["layers"].append({**d["layers"][0], "index": 5})), {},
        r"its layers are \[0, 1, 5\], its tensors are of \[0, 1\]",
    ),
    "no config.json": (lambda s: (s / "config.json").unlink(), {}, r"/config.json: cannot be read: No such "),
    "another config.json": (
        lambda s: _write(s / "config.json", (s / "config.json").read_bytes().replace(b"deepseek", b"DeepSeek")), {},
        r"/config.json: BLAKE3 is .*, manifest.json says .*; copy it again",
    ),
    "no file": (lambda s: (s / shard_file(1, 2)).unlink(), {}, r"cannot be read: No such file"),
    "a folder": (
        _a_folder, {},
        r"is a folder, expected a file"
    ),
    "longer": (
        lambda s: _write(s / shard_file(1, 2), (s / shard_file(1, 2)).read_bytes() + b"\0"), {},
        r"bytes, manifest.json says",
    ),
    "rank 0's file": (
        lambda s: _write(s / shard_file(1, 2), (s / shard_file(0, 2)).read_bytes()), {},
        r"its header says tp_rank '0', manifest.json says '1'",
    ),
    "no shard": (
        lambda s: _edit(s, lambda t: None, {"format": "pt"}), {},
        r"its header says denseffn None, manifest.json says 'shard'",
    ),
    "missing": (
        lambda s: _edit(s, lambda t: t.pop(W)), {},
        r"down_proj.weight: manifest.json names it, the file lacks it",
    ),
    "extra": (
        lambda s: _edit(s, lambda t: t.update(more=t[W])), {},
        r"more: the file has it, manifest.json does not name it",
    ),
    "type": (
        lambda s: _edit(s, lambda t: t.update({W: ("U8", *t[W][1:])})), {},
        r"down_proj.weight: is U8 \[256, 256\], manifest.json says I8 \[256, 256\]",
    ),
    "shape": (
        lambda s: _edit(s, lambda t: t.update({W: ("I8", (128, 512), t[W][2])})), {},
        r"down_proj.weight: is I8 \[128, 512\], manifest.json says I8 \[256, 256\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_refused_with_both_sides(shards: Path, case: str) -> None:
    damage, arguments, message = DAMAGE[case]
    damage(shards)
    with pytest.raises((ShardError, ManifestError), match=message) as caught:
        load_shard(shards, **{"tp_rank": 1, **arguments})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("part", [0.0, 0.00001, 0.001, 0.01, 0.5, 0.99999])
@pytest.mark.parametrize("says", ["the size that it was", "the size that it is"])
def test_truncated(shards: Path, part: float, says: str) -> None:
    path = shards / shard_file(1, 2)
    raw = path.read_bytes()
    _write(path, raw[: int(len(raw) * part)])
    if says.endswith("is"):
        _size(shards)
    with pytest.raises(ShardError, match="copy"):
        load_shard(shards, 1)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 3000), value=st.integers(0, 255))
def test_a_damaged_header_loads_the_same_or_not_at_all(shards: Path, at: int, value: int) -> None:
    path = shards / shard_file(1, 2)
    keep = path.with_suffix(".keep")
    if not keep.exists():
        shutil.copy(path, keep)
    raw = bytearray(keep.read_bytes())
    raw[at] = value
    _write(path, bytes(raw))
    try:
        found = load_shard(shards, 1)
    except ReshardError:
        return
    path.write_bytes(keep.read_bytes())
    assert _all_bits(found) == _all_bits(load_shard(shards, 1))


def test_tensors_that_a_header_exchanges(shards: Path, tmp_path: Path) -> None:
    """Of two of one shape only their places tell, where no byte is hashed; every reader of headers goes by them."""
    path = shards / shard_file(1, 2)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    one, other = (entries[f"model.layers.{layer}.mlp.down_proj.weight"] for layer in (0, 1))
    expected = 8 + length + one["data_offsets"][0]
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    assert len(text) == length
    _write(path, raw[:8] + text + raw[8 + length :])
    says = rf"{W}: begins at byte \d+, expected {expected}; copy the shard again"
    with pytest.raises(ShardError, match=says):
        load_shard(shards, 1)
    for command in (("inspect", shards), ("check", shards), ("verify", shards), ("merge", shards, tmp_path / "merged")):
        done = reshard(*command)
        assert done.code == {"check": 3, "verify": 3}.get(command[0], 1), command
        assert re.search(says, done.out + done.err), command


def _all_bits(shard: Shard) -> list[bytes]:
    return [
        _bits(t)
        for layer in shard.layers.values()
        for part in (layer.gate_up, layer.down)
        for t in part.tensors.values()
    ]


def test_a_separate_layout_whose_gate_and_up_share_no_scale_is_refused(tmp_path: Path) -> None:
    tensors = build(tmp_path / "model", Spec("modelslim_static", HIDDEN, INTERMEDIATE, files=1))
    name = "model.layers.0.mlp.up_proj.input_scale"
    tensors[name] = ("BF16", (1,), b"\x00\x40")
    write_safetensors(tmp_path / "model" / "model-00001-of-00001.safetensors", tensors, {"format": "pt"})
    split(tmp_path / "model", tmp_path / "shards", Cut(2, layout="separate"))
    with pytest.raises(ShardError, match=r"input_scale: gate_proj has \[.*\], up_proj has \[2.0\]; tokens are"):
        load_shard(tmp_path / "shards", 0)


@pytest.mark.parametrize(
    ("device", "kind", "message"),
    [("npu:3", MissingDependencyError, r"needs torch_npu, which .*: pip install torch_npu, in the version that fits"),
     ("tpu", UsageError, "device tpu: "),
     ("meta", UsageError, "there is a backend for cpu, cuda and npu only")],
)  # fmt: skip
def test_devices_that_are_not_there(shards: Path, device: str, kind: type[ReshardError], message: str) -> None:
    with pytest.raises(kind, match=message):
        load_shard(shards, 0, device)
