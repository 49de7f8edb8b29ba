"""Transforms of activations that a quantized model makes while it runs: what has one in a dense layer is not cut.

A Hadamard or Kronecker rotation in front of a row-parallel linear mixes all its inputs, of which a rank holds 1/R.
What is fused into the weights offline (compressed-tensors' weight_input and weight_output, SpinQuant's R1 and R2,
ModelSlim's global rotation) is in the weights that are cut.

Read from config.json and hf_quant_config.json, where a key at any level may speak of one, from ModelSlim's description
and from tensors, which may stand under another module: one copy of a shared matrix is stored, under the first module
that has it.
"""

import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from reshard.errors import SchemeError
from reshard.model.naming import CONFIG, parse_layer, stands_beside
from reshard.model.parts import DENSE_FFN
from reshard.quantization.accounts import MODELOPT, Accounts, list_accounts
from reshard.quantization.names import mentions
from reshard.quantization.section import Section

_WHY = (
    "an online transform is applied to activations while the model runs, and a rank that holds 1/R of the intermediate "
    "features cannot apply it; give weights quantized without one (what is fused into the weights, as SpinQuant's R1 "
    "and R2 are, can be cut)"
)

_CONFIG = "transform_config"
_ONLINE = frozenset({"input", "output"})
# Fused into the weights; of attention.
_ELSEWHERE = frozenset(["weight_input", "weight_output", "attn_q", "attn_k", "attn_v", "q_attn", "k_attn", "k_cache"])
_LINEARS = tuple(DENSE_FFN.names())
_OTHER_CLASSES = re.compile(r"\w*(?:Embedding|Attention|Norm|DecoderLayer|Model|ForCausalLM|LMHead|Router)\w*")
_SMELLS = re.compile(
    r"transform(?!er)|rotat|quarot|hadamard|kronecker|spinquant|flatquant|(?:^|_)had(?:_|$)", re.IGNORECASE
)
_ALGORITHMS = frozenset({"algo_config", "pre_quant_opt"})  # Quark's lists of what it did to a model
HARMLESS_KEYS: Mapping[str, str] = {
    r"(?:^|_)(?:rope|rotary)(?:_|$)": "the position embedding, of queries and keys (transformers' modeling_rope_utils)",
    r"^label2id$": "a classifier's labels (transformers' PreTrainedConfig)",
}
"""Keys of config.json, as patterns, that no transform of a dense layer is under, and why."""

# compressed-tensors keeps a transform's weight below the linear, as {group}_{location}.weight.
_STORED = re.compile(
    r"(?:^|\.)(?:[a-z_]*proj|lm_head|embed_tokens)\.(?P<group>\w+?)_(?P<location>(?:weight_)?(?:input|output))\.weight"
)
# ModelSlim's. A rotation is one for all layers, so that one in another module of a dense layer may be this one's.
_MODELSLIM = (
    (re.compile(r"(?:^|\.)kronecker_rotation_[mn]$"), "QuaRot's online Kronecker rotation"),
    (re.compile(r"\.mlp\.(?:.*\.)?div\.mul_scale$|\.mlp\.\w+_proj\.linear\.\w+$"), "smoothing that is not fused"),
    (re.compile(r"\.mlp\.(?:.*\.)?(?:left_trans|right_trans)$"), "FlatQuant's online transform"),
    (re.compile(r"\.mlp\.(?:.*\.)?svd_lowrank_l[12]$"), "a low-rank branch beside the weight (SVD)"),
)
HARMLESS_GLOBALS: Mapping[str, str] = {
    "is_rot_used": "rotations are fused into the weights; vllm-ascend rotates what a draft model is given",
    "metadata.quarot.max_tp_size": "a limit of the rotation of heads",
    "metadata.quarot.heads_rotation": "of attention's heads, in front of o_proj",
    "optional.quarot.rotation_map.global_rotation": "fused into the weights; kept for draft models",
}
"""What ModelSlim's description says of rotations that no dense layer makes, and why (its docs, vllm-ascend's code)."""

_CONTAINERS = {"metadata", "metadata.quarot", "optional", "optional.quarot", "optional.quarot.rotation_map"}
_MARKS = ("kronecker_rotation", ".div.", ".linear.", "_trans", "svd_lowrank", "_input.weight", "_output.weight")


def check_transforms(accounts: Accounts, mlps: Mapping[int, str], names: Iterable[str]) -> None:
    """Raises SchemeError where one is in a dense layer, or where it cannot be told that none is.

    mlps: the dense layers' MLPs by layer. names: of all tensors.
    """
    sections = [account.section for account in list_accounts(accounts) if account.section is not None]
    explained = {name for section in sections for name in _check_section(section, mlps.values())}
    read = [section.values.get(_CONFIG) for section in sections]
    for file, content in ((CONFIG, accounts.config), (MODELOPT, accounts.modelopt)):
        for place, key, value in _smelling(content or {}):
            if key != _CONFIG or value not in read:
                raise SchemeError(f"{file}: {place} is a transform that is not known; {_WHY}")
    if accounts.description is not None:
        _check_description(*accounts.description, mlps)
    _check_names(names, mlps, explained)


def _check_section(section: Section, mlps: Collection[str]) -> set[str]:
    """The transforms that it explains, where compressed-tensors lists the places of each. None may be in an MLP."""
    groups = section.objects(_CONFIG).get("config_groups") or {}
    if not isinstance(groups, dict):
        raise section.error(f"{_CONFIG}.config_groups", "is not an object of groups")
    modules = [f"{mlp}{below}" for mlp in mlps for below in (*(f".{role}" for role in _LINEARS), "", ".act_fn")]
    for name, group in groups.items():
        applied = group.get("apply") if isinstance(group, dict) else None
        if not isinstance(applied, list) or not all(isinstance(one, dict) for one in applied):
            raise section.error(f"{_CONFIG}.config_groups.{name}", "has no list of places where it applies")
        for one in applied:
            place = section.below(f"{_CONFIG}.config_groups.{name}", one)
            location = str(one.get("location"))
            if location in _ELSEWHERE:
                continue
            hit = next((module for module in modules if location not in _ONLINE or _targets(place, module)), None)
            if hit is not None:
                raise SchemeError(
                    f"{hit}: {section.file}: {section.at(_CONFIG)} has the transform {name} at its {location}; {_WHY}"
                )
    return set(groups)


def _targets(place: Section, module: str) -> bool:
    """Whether it applies to the module. A class that is not known to stand outside of an MLP may be one inside."""
    lists = {key: [value] if isinstance(value, str) else value for key, value in place.values.items()}
    place = place.below("", lists)
    ignored = mentions(_is_named, place.names("ignore"), module, place)
    return not ignored and mentions(_may_be, place.names("targets"), module, place)


def _is_named(entry: str, module: str) -> bool:
    return entry == module or (entry == "Linear" and module.endswith(_LINEARS))


def _may_be(entry: str, module: str) -> bool:
    is_class = entry[:1].isupper() and "." not in entry and entry != "Linear"
    return _is_named(entry, module) or (is_class and _OTHER_CLASSES.fullmatch(entry) is None)


def _smelling(content: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(place, key, value) of whatever speaks of a transform, at any level but below those of towers and drafts."""
    levels: deque[tuple[str, Any]] = deque([("", content)])
    while levels:
        path, level = levels.popleft()
        if isinstance(level, list):
            levels.extend((f"{path}[{index}]", value) for index, value in enumerate(level))
        for key, value in level.items() if isinstance(level, dict) else ():
            if stands_beside(f"{key}.") or any(re.search(pattern, key) for pattern in HARMLESS_KEYS):
                continue
            place = f"{path}.{key}" if path else key
            if not _SMELLS.search(str(value) if key in _ALGORITHMS else key):
                levels.append((place, value))
            elif _says(value):
                yield place, key, value


def _check_description(file: str, content: Mapping[str, Any], mlps: Mapping[int, str]) -> None:
    """ModelSlim's globals, which are no tensors' names: what says anything of a rotation must be known."""
    for key, value in _globals(content):
        if key in HARMLESS_GLOBALS or not _SMELLS.search(key) or not _says(value):
            continue
        layers = value.get("layers") if isinstance(value, dict) and "layers" in value else value
        if layers is value and not isinstance(value, list):
            raise SchemeError(f"{file}: {key} is a transform that is not known; {_WHY}")
        hit = next((mlp for layer, mlp in mlps.items() if _names(layers, layer)), None)
        if hit is not None:
            raise SchemeError(f"{hit}: {file}: {key} names its layer; {_WHY}")


def _globals(content: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        place = f"{within}.{key}" if within else key
        if place in _CONTAINERS and isinstance(value, dict):
            yield from _globals(value, place)
        elif within or "." not in key:
            yield place, value


def _says(value: object) -> bool:
    """Whether a value says anything: not null, false or 0, an empty list, nor an object of such."""
    return any(map(_says, value.values())) if isinstance(value, dict) else bool(value)


def _names(layers: Any, layer: int) -> bool:
    """Whether a list of layers (numbers, or names of modules) means a layer; what is neither may."""
    if not isinstance(layers, list):
        return True
    numbers = (re.search(r"(?:^|layers\.)(\d{1,9})(?:\.|$)", str(entry)) for entry in layers)
    return any(found is None or int(found[1]) == layer for found in numbers)


def _check_names(names: Iterable[str], mlps: Mapping[int, str], explained: set[str]) -> None:
    prefixes = {mlp.rpartition("layers.")[0] for mlp in mlps.values()}
    for name in names:
        if not any(mark in name for mark in _MARKS):
            continue
        parsed = parse_layer(name)
        own = parsed is None or parsed[0] in prefixes
        stored = _STORED.search(name)
        if stored and own and stored["location"] in _ONLINE and stored["group"] not in explained:
            raise SchemeError(f"{name}: no {_CONFIG} says where the transform {stored['group']} applies; {_WHY}")
        what = next((what for pattern, what in _MODELSLIM if pattern.search(name)), None)
        if what is not None and own and (parsed is None or parsed[1] in mlps):
            raise SchemeError(f"{name}: {what}; {_WHY}")
