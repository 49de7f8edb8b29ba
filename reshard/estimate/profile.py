"""Device profiles: `configs/hardware/*.toml`, or a file of the user's own. Every key is known, or it is an error."""

import tomllib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import reshard
from reshard.errors import ProfileError, UsageError

DEFAULT = "atlas-a2-376t"
LOCAL = "local"

_PACKAGE = Path(reshard.__file__).parent
# In a wheel the profiles lie in the package, in a clone where they are edited.
_FOLDERS = (_PACKAGE / "hardware", _PACKAGE.parent / "configs" / "hardware")
_NO_SOURCE = frozenset({"name", "source"})

_Count = Annotated[int, Field(ge=1)]
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Time = Annotated[float, Field(ge=0, allow_inf_nan=False)]
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


class Alignment(_Strict):
    """The device's tiles of a matrix, (rows, columns) of elements, and the largest last dim of its int8 kernel."""

    bf16_tile: Annotated[list[_Count], Field(min_length=2, max_length=2)]
    int8_tile: Annotated[list[_Count], Field(min_length=2, max_length=2)]
    last_dim_limit: _Count | None = None


class Profile(_Strict):
    """A device. `network`: from the fewest devices to the most; `source`: where each table's values come from."""

    name: str
    compute: Compute
    memory: Memory
    network: Annotated[dict[str, Network], Field(min_length=1)]
    efficiency: Efficiency
    static: Static
    alignment: Alignment | None = None
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
            raise ValueError(f"source: one line each is wanted for {', '.join(sorted(tables))}")
        return self


def names() -> list[str]:
    """The profiles that come with the program."""
    return sorted(path.stem for folder in _FOLDERS for path in folder.glob("*.toml"))


def load_profile(device: str, overrides: Sequence[str] = ()) -> Profile:
    """A profile by its name or its file, some values replaced by `table.key=value`.

    Raises ProfileError (no such profile, a key that is unknown or missing, a value that makes no sense), UsageError
    (an override of no key).
    """
    path = next((found for folder in _FOLDERS if (found := folder / f"{device}.toml").is_file()), None)
    if path is None and device == LOCAL:
        raise ProfileError(
            f"device {LOCAL} is this machine, which is to be measured first: reshard estimate --measure > local.toml, "
            "then --device local.toml"
        )
    if path is None and not device.endswith(".toml"):
        raise ProfileError(f"device {device}: no such profile; there are {', '.join(names())}, or give a .toml file")
    file = path or Path(device)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ProfileError(f"{file}: not valid TOML: {error}") from error
    profile = parse_profile(table, file.name)
    if not overrides:
        return profile
    changed = profile.model_dump(exclude_none=True)
    for override in overrides:
        _override(changed, override)
    return parse_profile(changed, "--set")


def parse_profile(table: Mapping[str, Any], file: str) -> Profile:
    """A profile from its TOML. Raises ProfileError naming the first key that is wrong."""
    try:
        return Profile.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            message = f"{where}: no key of a device profile"
        elif first["type"] == "missing":
            message = f"{where}: missing"
        elif first["type"] == "value_error":
            message = f"{where}: {first['ctx']['error']}" if where else str(first["ctx"]["error"])
        else:
            message = f"{where}: {first['msg']} (got {str(first['input'])[:80]!r})"
        raise ProfileError(f"{file}: {message}") from error


def _override(table: dict[str, Any], override: str) -> None:
    """Put `network.node.latency_us=1` where it belongs; what the value may be, the profile says."""
    key, equals, text = override.partition("=")
    *path, last = key.split(".")
    inner: Any = table
    for part in path:
        inner = inner.get(part) if isinstance(inner, dict) else None
    if not equals or not isinstance(inner, dict) or isinstance(inner.get(last, text), dict):
        raise UsageError(f"--set {override}: key=value is wanted, such as compute.bf16_tflops=300; {_keys(table)}")
    if last not in inner and not _may_be_absent(path, last):
        raise UsageError(f"--set {override}: no key of the profile; {_keys(table)}")
    try:
        inner[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        inner[last] = text  # a word, such as network.node.topology=switch


def _may_be_absent(path: Sequence[str], last: str) -> bool:
    return (path[:1] == ["network"] and len(path) == 2 and last == "devices") or (
        path == ["alignment"] and last == "last_dim_limit"
    )


def _keys(table: Mapping[str, Any], prefix: str = "") -> str:
    def walk(inner: Mapping[str, Any], above: str) -> list[str]:
        found = []
        for key, value in inner.items():
            found += walk(value, f"{above}{key}.") if isinstance(value, dict) else [f"{above}{key}"]
        return found

    return "it has " + ", ".join(key for key in walk(table, prefix) if not key.startswith("source."))
