"""Where it is said what the weights are: the accounts beside the files, the one that engines read first, first.

ModelSlim's description (vllm-ascend), then config.json's quantization_config (every engine), at its top or at any
level of the language model's, and compression_config, which vLLM reads where a level has none of the former; then
ModelOpt's hf_quant_config.json, which vLLM reads where config.json says nothing and TensorRT-LLM before it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reshard.errors import SourceError
from reshard.model.config import language_levels
from reshard.model.naming import CONFIG
from reshard.quantization.description import read_description
from reshard.quantization.methods import declared_by_method
from reshard.quantization.modelopt import FILE
from reshard.quantization.section import Section
from reshard.schemes import QuantSpec

_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Recorded:
    """What a manifest says of a linear."""

    scheme: str
    block: tuple[int, int] | None


@dataclass(frozen=True)
class Accounts:
    """All that is said of a checkpoint beside its tensors.

    description: the name and content of ModelSlim's. modelopt: the content of hf_quant_config.json. scheme: what
    `--scheme` says. recorded: of a shard set, what its manifest says of each linear, by the linear's name.
    """

    config: Mapping[str, Any] | None = None
    description: tuple[str, Mapping[str, Any]] | None = None
    modelopt: Mapping[str, Any] | None = None
    scheme: str | None = None
    recorded: Mapping[str, Recorded] | None = None


@dataclass(frozen=True)
class Account:
    """One of them: the file, the section of it that speaks of quantization if it is one, and what it says of a module.

    `declare` gives None where it says nothing of the module, and raises SourceError for what makes no sense.
    """

    file: str
    section: Section | None
    declare: Callable[[str], QuantSpec | None]


def list_accounts(accounts: Accounts) -> tuple[Account, ...]:
    """Those that there are. Raises SourceError for a section that is no object."""
    found = []
    if accounts.description is not None:
        found.append(Account(accounts.description[0], None, read_description(*accounts.description)))
    sections = [*_of_config(accounts.config), *_of_modelopt(accounts.modelopt)]
    return (*found, *(_account(section) for section in sections))


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of weights that are not quantized: none of its accounts is left, at no level."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _KEYS
    }


def _account(section: Section) -> Account:
    return Account(section.file, section, lambda module: declared_by_method(section, module))


def _of_config(config: Mapping[str, Any] | None) -> Iterator[Section]:
    """Those of each level, the one that engines read first, first; the same at two places is one."""
    seen: list[Any] = []
    for place, level in language_levels(config or {}):
        for key in _KEYS:
            value = level.get(key)
            if not _says(value) or value in seen:
                continue
            seen.append(value)
            path = f"{place}.{key}" if place else key
            yield Section(CONFIG, path, _object(CONFIG, path, value))


def _says(section: object) -> bool:
    """Whether a section says anything: exports of plain weights leave an empty one, or a method that is null."""
    return any(value is not None for value in section.values()) if isinstance(section, dict) else section is not None


def _of_modelopt(content: Mapping[str, Any] | None) -> Iterator[Section]:
    if content is not None:
        key = "quantization" if "quantization" in content else ""
        values = _object(FILE, key, content[key] if key else content)
        yield Section(FILE, key, {**values, "quant_method": "modelopt"})


def _object(file: str, path: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise SourceError(f"{file}: {path} is a {type(value).__name__}, expected an object")
    return value
