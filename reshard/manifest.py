"""manifest.json: what a shard set holds and where it came from, schema `denseffn-shards/2`.

It is written last: a folder without it is incomplete. Unknown fields and unknown versions are errors. The
plan is made of its entries, and a shard set that is read as a source gives them back.
"""

import json
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, Field, model_validator

from reshard.errors import ManifestError
from reshard.model.activation import Activation
from reshard.model.naming import MANIFEST, MAX_TP_SIZE, shard_file
from reshard.model.parts import PARTS, SIZES, Part
from reshard.quantization import SIDE_FILES, is_description, is_side_file
from reshard.schemes.table import SCHEMES, unknown_scheme
from reshard.sealed import Digest, OwnDigest, Sealed, Strict, parse_sealed, validate
from reshard.tensors.dtypes import BITS

SCHEMA = "denseffn-shards/2"
_OLDER = ("denseffn-shards/1",)

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Shape = tuple[Count, ...]
FileName = Annotated[str, Field(pattern=r"^[^/\\]+$", description="a name without folders")]


def _distinct(name: str) -> AfterValidator:
    """Of entries none has the same `name` as another."""

    def check(entries: list[Any]) -> list[Any]:
        seen: set[Any] = set()
        for value in (getattr(entry, name) for entry in entries):
            if value in seen:
                raise ValueError(f"{name} {value} is there twice")
            seen.add(value)
        return entries

    return AfterValidator(check)


class Generator(Strict):
    """What wrote the set."""

    name: str
    version: str


class ModelDims(Strict):
    """The sizes that the cut depends on, unpadded, and what precedes the tensors' names (reshard.model.naming).

    Sizes that the part's weights do not have are null; `num_hidden_layers` is, without a config.json.
    """

    model_type: str
    hidden_size: Positive
    intermediate_size: Positive | None = None
    vocab_size: Positive | None = None
    attention_size: Annotated[Positive | None, Field(description="all heads' values: o_proj's in_features")] = None
    num_hidden_layers: Positive | None
    prefix: Annotated[
        str,
        Field(pattern=r"^([^.]+\.)*$", description="what precedes layers.{i}, embed_tokens or lm_head in names"),
    ]

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that the part's weights have, by name."""
        return {name: size for name in SIZES if (size := getattr(self, name)) is not None}

    @property
    def shown(self) -> str:
        """The same in words."""
        return ", ".join(f"{name} {size}" for name, size in self.sizes.items())


def _known_part(key: str) -> str:
    if key not in PARTS:
        raise ValueError(f"unknown part {key}; known are {', '.join(PARTS)}")
    return key


def _known(scheme: str) -> str:
    if scheme not in SCHEMES:
        raise ValueError(unknown_scheme(scheme))
    return scheme


class LinearScheme(Strict):
    """What a linear is quantized as, and the block (rows, columns) of its weight that one scale stands for, if any."""

    scheme: Annotated[str, AfterValidator(_known)]
    block: tuple[Positive, Positive] | None = None

    def __str__(self) -> str:
        return f"{self.scheme} in blocks of {self.block[0]} x {self.block[1]}" if self.block else self.scheme


class LayerEntry(Strict):
    """A layer that has the part: its linears as the fused layout has them, and a dense layer's activation."""

    index: Annotated[Count | None, Field(description="null for a part that the model has once")]
    activation: Annotated[
        Activation | None,
        Field(description="null where the source had no config.json that says it, and in other parts"),
    ]
    linears: dict[str, LinearScheme]

    @property
    def number(self) -> int:
        """The index, in a part that layers have."""
        return cast("int", self.index)


class Padding(Strict):
    """Zeros behind the size that is shared out: rows (gate, up) and columns (down), or rows of a vocabulary."""

    padded: Annotated[int, Field(ge=1, alias="padded_size")]
    multiple: Annotated[
        int, Field(ge=1, description="what a rank's share, or the whole vocabulary, was padded to a multiple of")
    ]


class SourceFile(Strict):
    """A file that tensors were taken from."""

    name: FileName
    size: Count
    header_blake3: Digest


class Source(Strict):
    """Where the weights come from: a folder's name, also on another file system, or a hub repository and its commit."""

    kind: Annotated[
        str,
        Field(min_length=1, description="as the source says: folder, hub, remote (a folder on another file system)"),
    ]
    name: str
    commit: str | None
    sample_blake3: Annotated[Digest, Field(description="BLAKE3 of some bytes of every tensor that is split")]
    files: Annotated[list[SourceFile], _distinct("name")]


class Slice(Strict):
    """Positions start..stop of `dim` of a source tensor, placed from position `at` of that dim of the shard tensor."""

    tensor: str
    shape: Shape
    dim: Annotated[int, Field(ge=0, le=1)]
    start: Count
    stop: Count
    at: Count

    @model_validator(mode="after")
    def _within(self) -> "Slice":
        extent = self.shape[self.dim] if self.dim < len(self.shape) else 1 if not (self.shape or self.dim) else 0
        if not self.start < self.stop <= extent:
            raise ValueError(f"{self.tensor} has no positions {self.start}..{self.stop} of dim {self.dim}")
        return self


class Conversion(Strict):
    """Set where the sliced tensor is not the source's own but made from it: the rule, and the source's tensors."""

    rule: str
    inputs: tuple[str, ...]


def _element_type(dtype: str) -> str:
    if BITS.get(dtype, 1) % 8:
        raise ValueError(f"unknown type {dtype}; known are {', '.join(name for name in BITS if BITS[name] % 8 == 0)}")
    return dtype


class ShardTensor(Strict):
    """A tensor of a shard: `slices` of source tensors; bytes that no slice covers are zero."""

    name: str
    dtype: Annotated[str, AfterValidator(_element_type)]
    shape: Shape
    blake3: Digest
    slices: tuple[Slice, ...]
    same_as: Annotated[tuple[str, ...], Field(description="source tensors of the same value, held once")] = ()
    conversion: Conversion | None = None

    @model_validator(mode="after")
    def _held(self) -> "ShardTensor":
        if self.same_as and len(self.slices) != 1:
            raise ValueError(
                f"{self.name} stands for {self.same_as[0]} too, and holds {len(self.slices)} slices, not 1"
            )
        return self


class Shard(Strict):
    """One rank's file."""

    tp_rank: Count
    file: FileName
    size: Count
    blake3: Digest
    tensors: Annotated[list[ShardTensor], _distinct("name")]


class Record(Sealed):
    """A finished shard of an unfinished set, until the manifest takes it over; `fingerprint` tells whose it is."""

    blake3: OwnDigest
    fingerprint: Digest
    shard: Shard


def _goes_with_a_set(name: str) -> str:
    if not is_side_file(name):
        raise ValueError(f"{name} is no file that goes with a set: {SIDE_FILES} are")
    return name


class SideFile(Strict):
    """A file copied beside the shards: one of those that say what the weights are."""

    name: Annotated[FileName, AfterValidator(_goes_with_a_set)]
    size: Count
    blake3: Digest


def _one_description(files: list[SideFile]) -> list[SideFile]:
    names = [file.name for file in files if is_description(file.name)]
    if len(names) > 1:
        raise ValueError(f"{names[0]} and {names[1]} both describe the weights, a set has one of them")
    return files


class Manifest(Sealed):
    """A shard set."""

    OPTIONAL = frozenset({"parts"})

    schema_: Annotated[Literal["denseffn-shards/2"], Field(alias="schema")]
    blake3: OwnDigest
    generator: Generator
    part: Annotated[str, AfterValidator(_known_part), Field(description="what of the model it holds")]
    parts: Annotated[
        tuple[Annotated[str, AfterValidator(_known_part)], ...],
        Field(description="what was cut into one folder together, this part too; left out where it was cut alone"),
    ] = ()
    model: ModelDims
    scheme: Annotated[str, Field(description="the quantized linears' scheme; bf16 if none is, mixed if they differ")]
    tp_size: Annotated[int, Field(ge=1, le=MAX_TP_SIZE)]
    layout: Literal["fused", "separate"]
    padding: Padding | None
    layers: Annotated[list[LayerEntry], _distinct("index")]
    source: Source
    shards: list[Shard]
    files: Annotated[list[SideFile], _distinct("name"), AfterValidator(_one_description)]

    @property
    def what(self) -> Part:
        """The part that it holds."""
        return PARTS[self.part]

    @property
    def share(self) -> int:
        """A rank's share of the size that is shared out, padding and all."""
        return (self.padding.padded if self.padding else self.what.shared_size(self.model)) // self.tp_size

    @model_validator(mode="after")
    def _of_part(self) -> "Manifest":
        if self.parts and (self.part not in self.parts or len(set(self.parts)) < len(self.parts)):
            raise ValueError(f"parts are {', '.join(self.parts)}, expected {self.part} among them, each once")
        if sorted(self.model.sizes) != list(self.what.sizes):
            raise ValueError(
                f"the model's sizes are {', '.join(self.model.sizes)}, {self.part} has {', '.join(self.what.sizes)}"
            )
        expected = [module.name for module in self.what.modules]
        for layer in self.layers:
            if sorted(layer.linears) != sorted(expected):
                raise ValueError(f"linears are {', '.join(layer.linears)}, expected {', '.join(expected)}")
            if (layer.index is not None) is not self.what.place.in_layers:
                raise ValueError(f"the index of a layer is {layer.index}, and {self.part} is {self.what.place.value}")
        return self

    @model_validator(mode="after")
    def _complete(self) -> "Manifest":
        ranks = [shard.tp_rank for shard in self.shards]
        if ranks != list(range(self.tp_size)):
            raise ValueError(f"shards are of ranks {ranks}, tp_size {self.tp_size} makes it 0 to {self.tp_size - 1}")
        for shard in self.shards:
            wanted = shard_file(shard.tp_rank, self.tp_size, self.part)
            if shard.file != wanted:
                raise ValueError(f"rank {shard.tp_rank}'s file is {shard.file}, its name must be {wanted}")
        return self


def parse_manifest(raw: bytes, file: str = MANIFEST) -> Manifest:
    """A manifest from its bytes, as far as these alone tell: see reshard.plan.recompute for the rest.

    Raises ManifestError for an unknown version, an unknown field, a wrong value, a digest that is not the file's.
    """
    value = parse_sealed(raw, file)
    version = value.get("schema")
    if version in _OLDER:
        raise ManifestError(
            f"{file}: schema is {version!r}, which does not say what the layers compute; cut the set again with this "
            f"version, which writes {SCHEMA!r}"
        )
    if version != SCHEMA:
        raise ManifestError(
            f"{file}: schema is {version!r}, this version reads {SCHEMA!r}; use the reshard that wrote it"
        )
    return validate(Manifest, value, raw, file)


def parse_record(raw: bytes, file: str) -> Record:
    """One rank's record, as an unfinished set keeps it beside the shard. Raises as `parse_manifest` does."""
    return validate(Record, parse_sealed(raw, file), raw, file)


def json_schema() -> str:
    """The manifest's JSON Schema."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"
