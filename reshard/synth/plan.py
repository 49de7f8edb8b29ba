"""Which tensor goes into which file, and every byte that is not a tensor's: headers, index, config, description."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from reshard import limits
from reshard.errors import SourceError, UsageError
from reshard.model.config import known_dense_layers, language_config, read_model_config
from reshard.model.naming import CONFIG, parse_tensor
from reshard.model.prefix import published_prefix
from reshard.quantization import DESCRIPTION
from reshard.synth.config import shrink
from reshard.synth.model import Parameter, parameters
from reshard.synth.schemes import Recipe, TensorSpec, declare_in_config, description, recipe_for, tensors_of
from reshard.tensors.header import encode_header

_ALIGNMENT = 8
_FILE_BYTES = 4_250_000_000  # about what DeepSeek-R1's come to: 688.6 GB in 163 files


@dataclass(frozen=True)
class SynthOptions:
    """What to make of a config.json.

    layers: only the first so many; shards: number of files, 0 or None for about as many as a real checkpoint has.
    """

    scheme: str = "bf16"
    scale: Fraction = Fraction(1)
    layers: int | None = None
    shards: int | None = None
    sparse: bool = False
    dense_only: bool = False
    seed: int = 0


@dataclass(frozen=True)
class SynthFile:
    """A safetensors file: its header, then its tensors in that order."""

    name: str
    header: bytes
    tensors: tuple[TensorSpec, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class SynthPlan:
    """A checkpoint that is ready to be written. `side_files` are written after the tensors, the index last of all."""

    options: SynthOptions
    files: tuple[SynthFile, ...]
    side_files: Mapping[str, bytes]

    @property
    def size(self) -> int:
        """Bytes of the safetensors files: what `tick` adds up to."""
        return sum(file.size for file in self.files)


def plan_checkpoint(config: Mapping[str, Any], options: SynthOptions) -> SynthPlan:
    """Plan a checkpoint of the model of `config`. Raises UsageError, SourceError or SchemeError."""
    recipe = recipe_for(options.scheme)
    wrapper, language = language_config(config)
    shrunk = shrink(language, options.scale, options.layers)
    everything = _bounded(parameters(shrunk, published_prefix(config)), recipe)
    declare_in_config(shrunk, recipe, everything)
    kept = _dense(everything, shrunk) if options.dense_only else everything
    tensors = [tensor for parameter in kept for tensor in tensors_of(parameter, recipe)]
    types = description(recipe, kept)
    stem = "model" if types is None else "quant_model_weights"
    total = sum(tensor.nbytes for tensor in tensors)
    groups = _deal(tensors, options.shards or min(len(tensors), -(-total // _FILE_BYTES)))
    names = [f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    metadata = {"format": "pt"} if types is None else {}
    index = {
        "metadata": {"total_size": total},
        "weight_map": {t.name: name for name, group in zip(names, groups, strict=True) for t in group},
    }
    side_files = {CONFIG: _json(_wrapped(config, wrapper, shrunk))}
    if types is not None:
        side_files[DESCRIPTION] = _json(types)
    side_files[f"{stem}.safetensors.index.json"] = _json(index)
    files = tuple(_file(name, group, metadata) for name, group in zip(names, groups, strict=True))
    return SynthPlan(options, files, side_files)


def _bounded(everything: Iterable[Parameter], recipe: Recipe) -> list[Parameter]:
    """The parameters. Raises SourceError, before more are named, where their tensors are too many or too large."""
    found, tensors, size = [], 0, 0
    for parameter in everything:
        for tensor in tensors_of(parameter, recipe):
            tensors, size = tensors + 1, size + tensor.nbytes
        if tensors > limits.SYNTH_TENSORS or size > limits.SYNTH_BYTES:
            raise SourceError(
                f"{CONFIG}: a model of more than {limits.SYNTH_TENSORS:,} tensors or {limits.SYNTH_BYTES >> 40} TiB is "
                f"not made (up to {parameter.name}: {tensors:,}, {size:,} bytes); make it smaller with --scale or "
                "--layers"
            )
        found.append(parameter)
    return found


def _dense(everything: Sequence[Parameter], config: Mapping[str, Any]) -> list[Parameter]:
    model = read_model_config(config)
    dense = known_dense_layers(model)
    kept = [p for p in everything if (parsed := parse_tensor(p.name)) and parsed.layer in dense]
    if not kept:
        raise SourceError(f"{CONFIG}: no layer of the model is dense ({model.reason})")
    return kept


def _wrapped(config: Mapping[str, Any], wrapper: str | None, language: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with another language model's config in the place of its own."""
    if wrapper is None:
        return dict(language)
    key, _, rest = wrapper.partition(".")
    whole = dict(config)
    whole.pop("quantization_config", None)  # the language model's own says it
    whole[key] = _wrapped(whole[key], rest or None, language)
    return whole


def _deal(tensors: Sequence[TensorSpec], count: int) -> list[list[TensorSpec]]:
    """Runs of about equal bytes, none empty."""
    if not 1 <= count <= len(tensors):
        raise UsageError(f"shards {count}: the checkpoint has {len(tensors)} tensors; give a number up to that")
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    groups: list[list[TensorSpec]] = [[]]
    for place, tensor in enumerate(tensors):
        to_open = count - len(groups)
        full = done * count >= total * len(groups)
        if groups[-1] and to_open and (full or len(tensors) - place <= to_open):
            groups.append([])
        groups[-1].append(tensor)
        done += tensor.nbytes
    return groups


def _file(name: str, group: Sequence[TensorSpec], metadata: Mapping[str, str]) -> SynthFile:
    tensors = sorted(group, key=lambda tensor: tensor.order)
    entries = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    return SynthFile(name, encode_header(entries, metadata, _ALIGNMENT), tuple(tensors))


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
