"""JSON files of our own that hold their own digest: read strictly, and refused where they were changed by hand."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reshard.errors import ManifestError
from reshard.limits import MANIFEST_BYTES, MANIFEST_VALUES
from reshard.strict_json import parse_json

UNSEALED = "0" * 64
"""What stands in a digest's own place while it is computed."""

_HEX = r"^[0-9a-f]{64}$"
Digest = Annotated[str, Field(pattern=_HEX, description="BLAKE3, hex")]
OwnDigest = Annotated[
    str, Field(pattern=_HEX, description="BLAKE3, hex, of this very file with 64 zeros in this value's place")
]


class Strict(BaseModel):
    """An entry: unknown fields and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class Sealed(Strict):
    """A file; each has its digest under `blake3`. OPTIONAL: fields that are left out where they hold nothing."""

    OPTIONAL: ClassVar[frozenset[str]] = frozenset()

    def to_json(self) -> bytes:
        """The file's bytes."""
        empty = {name for name in self.OPTIONAL if not getattr(self, name)}
        return (self.model_dump_json(by_alias=True, indent=1, exclude=empty) + "\n").encode()

    def sealed(self) -> Self:
        """With its digest, where it was made with UNSEALED."""
        return self.model_copy(update={"blake3": blake3(self.to_json()).hexdigest()})


_S = TypeVar("_S", bound=Sealed)


def parse_sealed(raw: bytes, file: str) -> Mapping[str, Any]:
    """A file's content, whatever its fields. Raises ManifestError."""
    value = parse_json(raw, file, ManifestError, most=MANIFEST_BYTES, values=MANIFEST_VALUES)
    if not isinstance(value, dict):
        raise ManifestError(f"{file}: holds a {type(value).__name__}, expected a JSON object; copy it again")
    return value


def validate(model: type[_S], value: Mapping[str, Any], raw: bytes, file: str) -> _S:
    """A file from its content and its bytes. Raises ManifestError for another digest, then for another field."""
    said = value.get("blake3")
    if isinstance(said, str) and len(said) == len(UNSEALED):
        found = blake3(raw.replace(said.encode(), UNSEALED.encode(), 1)).hexdigest()
        if found != said:
            raise ManifestError(
                f"{file}: was changed after it was written: it says that its BLAKE3 is {said}, it is {found}; copy it "
                "again, or cut the set again"
            )
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ManifestError(
            f"{file}: {where}: {first['msg']} (got {str(first['input'])[:80]!r}); copy it again, or use the reshard "
            "that wrote it"
        ) from error
