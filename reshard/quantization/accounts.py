"""Where it is said what the weights are: the accounts beside the files, the one that engines read first, first.

ModelSlim's description (vllm-ascend), then config.json's quantization_config (every engine), at its top or at any
level of the language model's, and compression_config, which vLLM reads where a level has none of the former; then
ModelOpt's hf_quant_config.json, which vLLM reads where config.json says nothing and TensorRT-LLM before it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from reshard.errors import SourceError
from reshard.model.config import language_levels
from reshard.model.naming import CONFIG
from reshard.quantization.description import DESCRIPTION, is_description, read_description
from reshard.quantization.methods import declared_by_section
from reshard.quantization.section import Section
from reshard.schemes.match import QuantSpec
from reshard.strict_json import parse_object

MODELOPT = "hf_quant_config.json"
SIDE_FILES = f"{CONFIG}, {MODELOPT}, {DESCRIPTION} and what is named as that with a scheme"
_KEYS = ("quantization_config", "compression_config")


def is_side_file(name: str) -> bool:
    """Whether a file says what a checkpoint's weights are, and goes with every set that is cut from it."""
    return name in {CONFIG, MODELOPT} or is_description(name)


@dataclass(frozen=True)
class Accounts:
    """All that is said of a checkpoint beside its tensors.

    description: the name and content of ModelSlim's. modelopt: the content of hf_quant_config.json. scheme: what
    `--scheme` says. recorded: of a shard set, the scheme that its manifest says of each linear, by the linear's name.
    """

    config: Mapping[str, Any] | None = None
    description: tuple[str, Mapping[str, Any]] | None = None
    modelopt: Mapping[str, Any] | None = None
    scheme: str | None = None
    recorded: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Account:
    """One of them: the file, the section of it that speaks of quantization if it is one, and what it says of a module.

    `declare` gives None where it says nothing of the module, and raises SourceError for what makes no sense.
    """

    file: str
    section: Section | None
    declare: Callable[[str], QuantSpec | None]


def read_accounts(side_files: Mapping[str, bytes]) -> Accounts:
    """What the files that go with a set say of the weights."""
    read = {name: parse_object(raw, name) for name, raw in side_files.items()}
    description = next(((name, content) for name, content in read.items() if is_description(name)), None)
    return Accounts(read.get(CONFIG), description, read.get(MODELOPT))


def list_accounts(accounts: Accounts) -> tuple[Account, ...]:
    """Those that there are. Raises SourceError for a section that is no object."""
    sections = (*_of_config(accounts.config or {}), *_of_modelopt(accounts.modelopt))
    found = [Account(section.file, section, partial(declared_by_section, section)) for section in sections]
    if accounts.description is not None:
        found.insert(0, Account(accounts.description[0], None, read_description(*accounts.description)))
    return tuple(found)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of weights that are not quantized: none of its accounts is left, at no level."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _KEYS
    }


def _of_config(config: Mapping[str, Any]) -> Iterator[Section]:
    """Those of each level, the one that engines read first, first; the same at two places is one."""
    seen: list[Any] = []
    for place, level in language_levels(config):
        for key in _KEYS:
            value = level.get(key)
            # Exports of plain weights leave an empty one, or a method that is null.
            says = any(v is not None for v in value.values()) if isinstance(value, dict) else value is not None
            if says and value not in seen:
                seen.append(value)
                yield _section(CONFIG, f"{place}.{key}" if place else key, value)


def _of_modelopt(content: Mapping[str, Any] | None) -> Iterator[Section]:
    if content is not None:
        key = "quantization" if "quantization" in content else ""
        section = _section(MODELOPT, key, content[key] if key else content)
        yield section.below("", {**section.values, "quant_method": "modelopt"})


def _section(file: str, path: str, value: Any) -> Section:
    if not isinstance(value, dict):
        raise SourceError(f"{file}: {path} is a {type(value).__name__}, expected an object")
    return Section(file, path, value)
