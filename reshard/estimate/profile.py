"""Device profiles: `configs/hardware/*.toml`, or a file of the user's own. Every key is known, or it is an error."""

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from itertools import pairwise
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import reshard
from reshard.errors import ProfileError, UsageError
from reshard.limits import TOML_BYTES
from reshard.regular import read_whole, unreadable
from reshard.tensors.tiles import LAST_DIM_LIMIT

GIB, MIB = 1 << 30, 1 << 20
LOCAL = "local"

_PACKAGE = Path(reshard.__file__).parent
# In a wheel the profiles lie in the package, in a clone where they are edited.
_FOLDERS = (_PACKAGE / "hardware", _PACKAGE.parent / "configs" / "hardware")
_NO_SOURCE = frozenset({"name", "source"})

# Bounds that no device comes near, so that sums and quotients of such numbers are finite.
_Count = Annotated[int, Field(ge=1, le=10**9)]
_Rate = Annotated[float, Field(ge=1e-9, le=1e9)]
_Time = Annotated[float, Field(ge=0, le=1e9)]
_Share = Annotated[float, Field(gt=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Compute(_Strict):
    """Peak rates of matrix products, 10^12 operations a second; a multiplication and an addition are two.

    overlap: weights are read while others are multiplied; a processor's thread does one after the other.
    """

    bf16_tflops: _Rate
    int8_tops: _Rate
    overlap: bool


class Memory(_Strict):
    """`cache_mib`: activations up to this size stay in the cache from one kernel to the next."""

    capacity_gib: _Rate
    bandwidth_gib_s: _Rate
    cache_mib: _Time


class Network(_Strict):
    """What connects `devices` devices (absent: any number).

    bandwidth_gb_s: of one device, one way, 10^9 bytes a second. mesh: each pair has a link of its own, one of
    devices - 1 equal parts of the bandwidth. switch: the bandwidth reaches any number of peers.
    """

    devices: _Count | None = None
    topology: Literal["mesh", "switch"]
    bandwidth_gb_s: _Rate
    latency_us: _Time

    @model_validator(mode="after")
    def _mesh_has_a_size(self) -> Self:
        if self.topology == "mesh" and (self.devices is None or self.devices < 2):
            raise ValueError("a mesh has 2 devices or more")
        return self


class Efficiency(_Strict):
    """The shares of the peaks that are reached."""

    compute: _Share
    memory_bf16: _Share
    memory_int8: _Share
    communication: _Share


class Static(_Strict):
    """What each kernel or collective takes beside its work, microseconds."""

    matmul_us: _Time
    vector_us: _Time
    collective_us: _Time


class Tiles(_Strict):
    """The device's tiles of a matrix, (rows, columns) of elements, and the largest last dim of its int8 kernel."""

    bf16_tile: Annotated[list[_Count], Field(min_length=2, max_length=2)]
    int8_tile: Annotated[list[_Count], Field(min_length=2, max_length=2)]
    last_dim_limit: _Count = LAST_DIM_LIMIT


class Profile(_Strict):
    """A device. `network`: from the fewest devices to the most; `source`: where each table's values come from."""

    name: str
    compute: Compute
    memory: Memory
    network: Annotated[dict[str, Network], Field(min_length=1)]
    efficiency: Efficiency
    static: Static
    alignment: Tiles | None = None
    source: dict[str, str]

    @model_validator(mode="after")
    def _levels_grow(self) -> Self:
        sizes = [level.devices or float("inf") for level in self.network.values()]
        if any(inner >= outer for inner, outer in pairwise(sizes)):
            raise ValueError("network: each table after the first has more devices than the one before it")
        return self

    @model_validator(mode="after")
    def _has_sources(self) -> Self:
        tables = {key for key, value in self if value is not None} - _NO_SOURCE
        if self.source.keys() != tables:
            raise ValueError(f"source: expected one line each for {', '.join(sorted(tables))}")
        return self


def names() -> list[str]:
    """The profiles that come with the program."""
    return sorted(path.stem for folder in _FOLDERS for path in folder.glob("*.toml"))


def load_profile(device: str, overrides: Sequence[str] = ()) -> Profile:
    """A profile by its name or its file, some values replaced by `table.key=value`.

    Raises ProfileError (no such profile, a key that is unknown or missing, a value that makes no sense), UsageError
    (an override of no key).
    """
    path = next((found for folder in _FOLDERS if os.path.isfile(found := folder / f"{device}.toml")), None)
    if path is None and device == LOCAL:
        raise ProfileError(
            f"device {LOCAL} is this machine, which is to be measured first: reshard estimate --measure > local.toml, "
            "then --device local.toml"
        )
    if path is None and not device.endswith(".toml"):
        raise ProfileError(f"device {device}: no such profile; there are {', '.join(names())}, or give a .toml file")
    file = path or Path(device)
    try:
        table = tomllib.loads(read_whole(file, TOML_BYTES).decode())
    except OSError as error:
        raise ProfileError(unreadable(file, error)) from error
    except (ValueError, RecursionError) as error:  # not TOML, or not UTF-8
        raise ProfileError(f"{file}: not valid TOML: {error}") from error
    profile = parse_profile(table, file.name)
    return parse_profile(_overridden(profile, overrides), "--set") if overrides else profile


def parse_profile(table: Mapping[str, Any], file: str) -> Profile:
    """A profile from its TOML. Raises ProfileError naming the first key that is wrong."""
    try:
        return Profile.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        messages = {"extra_forbidden": "no key of a device profile", "missing": "missing"}
        if first["type"] == "value_error":
            message = str(first["ctx"]["error"])
        else:
            message = messages.get(first["type"], f"{first['msg']} (got {str(first['input'])[:80]!r})")
        where = [".".join(map(str, first["loc"]))] if first["loc"] else []
        raise ProfileError(": ".join((file, *where, message))) from error


def _overridden(profile: Profile, overrides: Sequence[str]) -> dict[str, Any]:
    """The profile's table with values such as `network.node.latency_us=1`; what a value may be, the profile says."""
    keys = list(_keys(profile.model_dump(exclude={"source"})))
    table = profile.model_dump(exclude_none=True)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or key not in keys:
            raise UsageError(
                f"--set {override}: expected KEY=VALUE, such as compute.bf16_tflops=300, with a key of the profile: it "
                f"has {', '.join(keys)}"
            )
        *path, last = key.split(".")
        inner = reduce(getitem, path, table)
        try:
            inner[last] = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            inner[last] = text  # a word, such as network.node.topology=switch
    return table


def _keys(table: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, value in table.items():
        yield from _keys(value, f"{above}{key}.") if isinstance(value, dict) else (f"{above}{key}",)
