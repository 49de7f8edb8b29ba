"""A case: one subject, damaged in a way that its number alone decides, and the commands that are run over it."""

import functools
import json
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz import answers, runs
from tests.fuzz.runs import Run
from tests.fuzz.subjects import SUBJECTS, Made, copy
from tests.support import mutate
from tests.support import mutate_tree as tree_of
from tests.support.hub_server import REPO
from tests.support.mutate_files import mutate_bytes, mutate_header, mutate_kind, replace
from tests.support.seal import reseal

MANIFEST = "manifest.json"
_ACCOUNTS = {
    "manifest": ("tp_size", "layout", "padding", "same_as", "conversion", "slices", "block", "activation"),
    "config": (
        "quantization_config",
        "compression_config",
        "text_config",
        "hidden_act",
        "hidden_activation",
        "mlp_only_layers",
        "moe_layer_freq",
        "decoder_sparse_step",
        "num_experts",
        "first_k_dense_replace",
        "num_nextn_predict_layers",
        "layer_types",
        "mlp_layer_types",
        "swiglu_limit",
        "torch_dtype",
        "modules_to_not_convert",
        "ignore",
        "ignored_layers",
        "config_groups",
        "targets",
        "weight_block_size",
        "transform_config",
        "kv_cache_scheme",
    ),
    "index": ("weight_map", "metadata", "total_size"),
    "description": ("model_quant_type", "group_size", "version", "optional", "metadata", "is_mx"),
    "hf_quant_config": ("quantization", "producer", "quant_algo", "exclude_modules", "quantized_layers", "group_size"),
    "record": ("fingerprint", "shard"),
}


@dataclass
class Case:
    """What was done, and what is run. around: what must hold while it runs: a server, whose address it gives."""

    said: str
    runs: list[Run]
    around: AbstractContextManager[str | None] = field(default_factory=nullcontext)


def make_case(seed: int, number: int, made: Callable[[str], Made], folder: Path, most: int | None = None) -> Case:
    """The case of a number. made: gives a subject, on the disk; folder: empty, the case's own.

    most: of the commands only so many, by chance.
    """
    rng = random.Random(f"{seed}:{number}")
    name = rng.choices(sorted(_KINDS), [_KINDS[kind][0] for kind in sorted(_KINDS)])[0]
    subject = made(rng.choice(SUBJECTS).name)
    case = _KINDS[name][1](rng, subject, folder)
    if most is not None and most < len(case.runs):
        case.runs = [case.runs[index] for index in sorted(rng.sample(range(len(case.runs)), most))]
    case.said = f"{name} of {subject.subject.name}: {case.said}"
    return case


def _tree(rng: random.Random, raw: bytes, account: str) -> tuple[bytes, str]:
    """JSON with one change of its tree, sometimes two or three."""
    tree, said = tree_of.parse(raw), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if isinstance(tree, list) and tree:
            said.append(mutate.mutate(rng, tree, _ACCOUNTS[account]))
    return tree_of.encode(tree), "; ".join(said)


def _json(rng: random.Random, raw: bytes, account: str) -> tuple[bytes, str]:
    """JSON changed, mostly in its tree."""
    kind = rng.random()
    if kind < 0.85:
        return _tree(rng, raw, account)
    return mutate.mutate_text(rng, raw) if kind < 0.95 else mutate_bytes(rng, raw)


def _manifest(rng: random.Random, made: Made, folder: Path) -> Case:
    out = copy(made.whole, folder / "set")
    raw, said = _json(rng, (out / MANIFEST).read_bytes(), "manifest")
    if sealed := rng.random() < 0.7:
        raw = reseal(raw)
    replace(out / MANIFEST, raw)
    return Case(f"{said}{', sealed again' if sealed else ''}", runs.of_set(rng, made, out, folder))


def _shard(rng: random.Random, made: Made, folder: Path) -> Case:
    """A shard's header or bytes, or another's shard in its place."""
    out = copy(made.whole, folder / "set")
    path = rng.choice(sorted(out.glob("*.safetensors")))
    raw = path.read_bytes()
    kind = rng.random()
    if kind < 0.45:
        changed, said = mutate_header(rng, raw)
    elif kind < 0.8:
        changed, said = mutate_bytes(rng, raw, 8 + int.from_bytes(raw[:8], "little"))
    else:
        origin = rng.choice([made.other / path.name, *made.whole.glob("*.safetensors")])
        changed, said = origin.read_bytes(), f"{origin.parent.name}'s {origin.name}"
    replace(path, changed)
    return Case(f"{path.name}: {said}", runs.of_set(rng, made, out, folder, weights_changed=kind >= 0.45))


def _beside(rng: random.Random, made: Made, folder: Path) -> Case:
    """The files that go with a set, which the manifest may have been told."""
    out = copy(made.whole, folder / "set")
    path = rng.choice(sorted(set(out.glob("*.json")) - {out / MANIFEST}))
    changed, said = _json(rng, path.read_bytes(), _account(path.name))
    if told := rng.random() < 0.5:
        _tell(out, path.name, changed)
    replace(path, changed)
    return Case(f"{path.name}: {said}{', the manifest told' if told else ''}", runs.of_set(rng, made, out, folder))


def _tell(out: Path, name: str, data: bytes) -> None:
    from blake3 import blake3

    manifest = json.loads((out / MANIFEST).read_bytes())
    for file in manifest["files"]:
        if file["name"] == name:
            file.update(size=len(data), blake3=blake3(data).hexdigest())
    replace(out / MANIFEST, reseal(json.dumps(manifest).encode()))


def _under(rng: random.Random, made: Made, folder: Path) -> Case:
    """Another kind of file under a name, or a file that does not belong there."""
    of_set = rng.random() < 0.5
    out = copy(made.whole if of_set else made.source, folder / ("set" if of_set else "source"))
    said = _foreign(rng, out) if rng.random() < 0.3 else _kind(rng, out)
    commands = runs.of_set if of_set else runs.of_source
    return Case(said, commands(rng, made, out, folder))


def _kind(rng: random.Random, out: Path) -> str:
    path = rng.choice(sorted(out.iterdir()))
    return f"{path.name} is {mutate_kind(rng, path)}"


def _foreign(rng: random.Random, out: Path) -> str:
    names = [
        b"denseffn-rank-00002-of-00003.safetensors",
        b"denseffn-rank-00000-of-00002.record.json",
        b"model-00009-of-00009.safetensors",
        b"other.safetensors.index.json",
        b"quant_model_description_w8a8_dynamic.json",
        b"hf_quant_config.json",
        b"\xff\xfe.safetensors",
        b"\x1b[31m.safetensors",
        b"::error::x.safetensors",
        b"z" * 250 + b".json",
        b"adapter_config.json",
    ]
    name = rng.choice(names)
    origin = rng.choice(sorted(out.iterdir()))
    with open(bytes(out) + b"/" + name, "wb") as stream:
        stream.write(origin.read_bytes() if rng.random() < 0.7 else b"")
    return f"{name!r} beside it, a copy of {origin.name} or empty"


def _account(name: str) -> str:
    if name.endswith(".index.json"):
        return "index"
    return {"config.json": "config", "hf_quant_config.json": "hf_quant_config"}.get(name, "description")


def _json_of_source(wanted: str, rng: random.Random, made: Made, folder: Path) -> Case:
    """A config, an index, a description or an hf_quant_config, which the subject may have been given for it."""
    source = copy(made.source, folder / "source")
    found = [path for path in sorted(source.glob("*.json")) if _account(path.name) == wanted]
    if found:
        path, raw = found[0], found[0].read_bytes()
    else:
        path, raw = source / "hf_quant_config.json", json.dumps(rng.choice(_MODELOPT)).encode()
        if wanted == "description":
            path, raw = source / "quant_model_description.json", json.dumps(dict.fromkeys(made.dense, "FLOAT")).encode()
    changed, said = _json(rng, raw, wanted)
    replace(path, changed)
    return Case(f"{path.name}: {said}", runs.of_source(rng, made, source, folder))


_MODELOPT: tuple[dict[str, Any], ...] = (
    {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": None, "exclude_modules": ["lm_head"]}},
    {
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quantization": {
            "quant_algo": "FP8_PB_WO",
            "kv_cache_quant_algo": None,
            "group_size": 128,
            "exclude_modules": ["lm_head", "*self_attn*", "re:.*"],
        },
    },
    {
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {"model.layers.0.mlp.gate_proj": {"quant_algo": "FP8"}},
        }
    },
)


def _weights_of_source(rng: random.Random, made: Made, folder: Path) -> Case:
    """A weights file's header or bytes."""
    source = copy(made.source, folder / "source")
    path = rng.choice(sorted(source.glob("*.safetensors")))
    raw = path.read_bytes()
    if rng.random() < 0.75:
        changed, said = mutate_header(rng, raw)
    else:
        changed, said = mutate_bytes(rng, raw, 8 + int.from_bytes(raw[:8], "little"))
    replace(path, changed)
    return Case(f"{path.name}: {said}", runs.of_source(rng, made, source, folder))


def _record(rng: random.Random, made: Made, folder: Path) -> Case:
    """An unfinished set: a rank's record, or its shard."""
    out = copy(made.unfinished, folder / "set")
    path = rng.choice(sorted(out.glob("*.record.json"))) if rng.random() < 0.7 else next(out.glob("*.safetensors"))
    raw = path.read_bytes()
    if path.suffix == ".json":
        changed, said = _json(rng, raw, "record")
        changed = reseal(changed) if rng.random() < 0.7 else changed
    else:
        changed, said = rng.choice([mutate_header, mutate_bytes])(rng, raw)
    replace(path, changed)
    if rng.random() < 0.1:
        said = f"{path.name} is {mutate_kind(rng, path)}"
    return Case(f"{path.name}: {said}", runs.of_unfinished(rng, made, out, folder))


def _server(kinds: Mapping[str, int], address: str, rng: random.Random, made: Made, folder: Path) -> Case:
    """A hub, or a plain server, whose answers are wrong."""
    fault, said = answers.fault(rng, kinds)
    of_set = rng.random() < 0.3
    served = made.whole if of_set else made.source
    commands = (
        runs.of_set(rng, made, served, folder, address=address)
        if of_set
        else runs.of_address(address, rng, made, folder)
    )
    return Case(f"{said}, {served.name}", commands, answers.serving_files(served, fault))


_Maker = Callable[[random.Random, Made, Path], Case]
_KINDS: dict[str, tuple[int, _Maker]] = {
    "manifest": (26, _manifest),
    "shard": (13, _shard),
    "set's file": (7, _beside),
    "kind of file": (7, _under),
    "config": (13, functools.partial(_json_of_source, "config")),
    "index": (6, functools.partial(_json_of_source, "index")),
    "description": (6, functools.partial(_json_of_source, "description")),
    "hf_quant_config": (3, functools.partial(_json_of_source, "hf_quant_config")),
    "weights": (9, _weights_of_source),
    "record": (6, _record),
    "hub": (8, functools.partial(_server, answers.HUB, REPO)),
    "server": (5, functools.partial(_server, answers.PLAIN, runs.HERE)),
}
