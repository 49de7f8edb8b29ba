"""The side files of a checkpoint that is put together from sets of one origin, of which some were converted."""

import reprlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from reshard.checkpoint.describe import describe_layers
from reshard.checkpoint.description import Checkpoint
from reshard.convert.declared import declared, go_together, quantized
from reshard.errors import ReshardError, SourceError
from reshard.model.naming import CONFIG
from reshard.quantization import read_accounts, without_quantization
from reshard.strict_json import parse_object

_APART = "merge each by itself"

Sets = Sequence[tuple[str, Checkpoint]]
"""Names, for messages, and what each set holds."""


def common_files(sets: Sets) -> dict[str, bytes]:
    """What is true of every tensor of the sets, whose own files differ, read again to see that it is.

    Raises SourceError where they differ in more than what a conversion changes, and where no tool's files say it.
    """
    if not any(tensor.conversion for _, checkpoint in sets for tensor in checkpoint.tensors()):
        raise SourceError(f"{_differing(sets)} differ: the sets are of two checkpoints; {_APART}")
    config = _config(sets)
    kinds = [(name, variant) for name, checkpoint in sets for variant in quantized(checkpoint.layers)]
    for (one, first), (other, second) in combinations(kinds, 2):
        if not go_together(first, second):
            raise SourceError(
                f"{one} holds {first.kind} and {other} {second.kind}: no tool's files say both of one checkpoint; "
                f"convert both alike (split --weights), or {_APART}"
            )
    files = declared(config, [layer for _, checkpoint in sets for layer in checkpoint.layers])
    _check(files, sets)
    return files


def _differing(sets: Sets) -> str:
    """The first file that two sets have not alike."""
    (first, one), *others = sets
    for name, other in others:
        for file in sorted(one.side_files.keys() | other.side_files.keys()):
            if one.side_files.get(file) != other.side_files.get(file):
                return f"{file} of {first} and of {name}"
    raise AssertionError("the sets' files are alike")


def _config(sets: Sets) -> dict[str, Any] | None:
    """config.json without what it says of the quantization, which is all that a conversion changes."""
    configs = [
        (name, without_quantization(parse_object(checkpoint.side_files[CONFIG], CONFIG)))
        if CONFIG in checkpoint.side_files
        else (name, None)
        for name, checkpoint in sets
    ]
    (first, one), *others = configs
    for name, other in others:
        if other == one:
            continue
        if one is None or other is None:
            with_it, without = (first, name) if other is None else (name, first)
            raise SourceError(f"{with_it} has a {CONFIG}, and {without} has none; {_APART}")
        key = next(key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key))
        values = " and ".join(reprlib.repr(config.get(key)) for config in (one, other))
        raise SourceError(f"{CONFIG} of {first} and of {name} differ in {key}: {values}; {_APART}")
    return one


def _check(files: Mapping[str, bytes], sets: Sets) -> None:
    """Raises SourceError where the files, as they are read, make something else of a set's tensors than they are."""
    accounts = read_accounts(files)
    tensors = {tensor.name: tensor for _, checkpoint in sets for tensor in checkpoint.stored()}
    for name, checkpoint in sets:
        own = {tensor.name: tensor for tensor in checkpoint.stored()}
        try:
            _, layers, _ = describe_layers(own, sorted(tensors.keys() - own.keys()), accounts, checkpoint.part)
            wrong = None if layers == checkpoint.layers else "would be read as something else"
        except ReshardError as error:
            wrong = f"would not be read: {error}"
        if wrong:
            raise SourceError(f"{name}: with what the sets have in common in {', '.join(files)} it {wrong}; {_APART}")
