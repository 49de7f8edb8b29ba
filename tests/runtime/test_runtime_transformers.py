"""Split dense layers inside models of Hugging Face transformers: results, what is replaced, memory, refusals."""

import copy
import functools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from reshard.errors import ReshardError, ShardError
from reshard.plan.pipeline import Cut
from reshard_runtime import Shard, load_shard
from reshard_runtime.serving.transformers import attach, load_model
from tests.support.builders import dense_only, read_safetensors, write_safetensors
from tests.support.distributed import Ranks
from tests.support.records import Records
from tests.support.running import reshard, split
from tests.support.unsplit import error, plain

transformers.utils.logging.disable_progress_bar()

Start = Callable[[int], Ranks]
HIDDEN, INTERMEDIATE, DENSE, VOCABULARY = 256, 512, 3, 256
# Every token goes to all eight experts: none that a rounding can send to others.
CONFIG = {
    "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "moe_intermediate_size": 64, "num_hidden_layers": 4,
    "first_k_dense_replace": DENSE, "n_routed_experts": 8, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "vocab_size": VOCABULARY,
    "initializer_range": HIDDEN**-0.5,
}  # fmt: skip
LLAMA = {
    "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "initializer_range": HIDDEN**-0.5,
}  # fmt: skip
GENERATED = {"min_new_tokens": 8, "max_new_tokens": 8}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _model(**changes: Any) -> Any:
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**(CONFIG | changes))).eval()


def _ids(ranks: int, length: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(2, VOCABULARY, (ranks, 2, length), generator=generator))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in float32 and in BF16, in files of 1 MB, a Llama, and shard sets of each: `<model>-tp<R>`."""
    folder = tmp_path_factory.mktemp("models")
    for name, dtype in TYPES.items():
        _model().to(dtype).save_pretrained(folder / name, max_shard_size="1MB")
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder / "llama")
    for name in (*TYPES, "llama"):
        for size in (2, 4):
            split(folder / name, folder / f"{name}-tp{size}", Cut(size))
    split(folder / "llama", folder / "llama-tp1", Cut(1))
    split(folder / "bf16", folder / "w8a8-tp2", Cut(2, weights="w8a8"))
    shutil.copytree(folder / "bf16-tp2", folder / "missing")
    (folder / "missing" / "denseffn-rank-00001-of-00002.safetensors").unlink()
    return folder


def _split_model(how: str, model: Path, shards: Path, group: dist.ProcessGroup, **options: Any) -> Any:
    if how == "load_model":
        return load_model(model, shards, group, **options)
    return attach(AutoModelForCausalLM.from_pretrained(model), shards, group, **options)


@functools.cache
def _whole(model: Path, dtype: Any = "auto") -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)


@torch.inference_mode()
def _whole_logits(model: Path, ids: list[torch.Tensor], dtype: Any = "auto") -> torch.Tensor:
    return torch.cat([_whole(model, dtype)(own).logits.flatten(0, 1) for own in ids])


def _logits(
    group: dist.ProcessGroup, how: str, model: Path, shards: Path, ids: list[torch.Tensor], options: dict[str, Any]
) -> torch.Tensor:
    """With gradients on, as a model that was just loaded is called."""
    return _split_model(how, model, shards, group, **options)(ids[group.rank()]).logits.detach().flatten(0, 1)


# A float32 sum of n terms in another order is off by about sqrt(n) roundings of 2^-24: 1.3e-6 for 512, in each of three
# layers, whose outputs are about as large as what they are added to. BF16 is compared with float32, and may be off by
# what a single layer may (test_runtime_accuracy.py) times the unsplit BF16 model's own error.
FLOAT32_BOUND, ALLOWED = 3e-6, 1.5
WAYS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "scattered": ("attach", {}, (12, 12, 12, 12)),
    "replicated": ("attach", {"tokens": "replicated"}, (12, 12, 12, 12)),
    "max_tokens": ("attach", {"max_tokens": 2 * 12}, (12, 5, 1, 8)),
    "load_model": ("load_model", {}, (12, 12, 12, 12)),
}


@pytest.mark.parametrize(
    ("size", "name", "way"),
    [*((2, name, way) for name in TYPES for way in WAYS), *((4, "bf16", way) for way in ("scattered", "max_tokens"))],
)
def test_logits_are_the_unsplit_models(ranks: Start, models: Path, size: int, name: str, way: str) -> None:
    how, options, lengths = WAYS[way]
    ids = _ids(1) * size if way == "replicated" else _ids(size)
    ids = [own[:, :length] for own, length in zip(ids, lengths, strict=False)]
    outputs = ranks(size).run(_logits, how, models / name, models / f"{name}-tp{size}", ids, options)
    found, own = torch.cat(outputs), _whole_logits(models / name, ids)
    reference = _whole_logits(models / name, ids, torch.float32).double()
    assert found.dtype == TYPES[name]
    assert error(found, reference) <= (FLOAT32_BOUND if name == "fp32" else ALLOWED * error(own, reference))
    if way == "replicated":
        assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_logits_depend_on_the_dense_layers(models: Path) -> None:
    """The bounds above are no bounds if they do not: four of 512 columns of one layer are far above them."""
    model, ids = AutoModelForCausalLM.from_pretrained(models / "fp32"), _ids(1)
    with torch.inference_mode():
        model.model.layers[1].mlp.down_proj.weight[:, :4] = 0
        changed = model(ids[0]).logits.flatten(0, 1)
    assert error(changed, _whole_logits(models / "fp32", ids).double()) > 0.02


@pytest.mark.parametrize("how", ["attach", "load_model"])
def test_w8a8_layers_in_a_bf16_model(ranks: Start, models: Path, how: str) -> None:
    ids = _ids(2)
    found = torch.cat(ranks(2).run(_logits, how, models / "bf16", models / "w8a8-tp2", ids, {}))
    # A step is max/127, and a value off by step / sqrt(12): 0.7 % of the weights and tokens (max 3 times the typical
    # value), 1.4 % of h (6 times). Together 2 % of a layer, 3.5 % of three, and twice that for what later layers make
    # of it. Far above BF16's own 1.3 %, or it was not W8A8.
    assert 0.02 < error(found, _whole_logits(models / "bf16", ids, torch.float32).double()) <= 0.07


@pytest.mark.parametrize("how", ["attach", "load_model"])
def test_a_llama_is_dense_in_every_layer(ranks: Start, models: Path, how: str) -> None:
    ids, options = _ids(1) * 2, {"tokens": "replicated"}
    for found in ranks(2).run(_logits, how, models / "llama", models / "llama-tp2", ids, options):
        assert error(found, _whole_logits(models / "llama", ids[:1]).double()) <= FLOAT32_BOUND


def _greedy(model: Any, ids: torch.Tensor) -> list[list[int]]:
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **GENERATED).tolist()


def _generated(
    group: dist.ProcessGroup, model: Path, shards: Path, ids: list[torch.Tensor], options: dict[str, Any]
) -> list[list[int]]:
    return _greedy(_split_model("attach", model, shards, group, **options), ids[group.rank()])


@pytest.mark.parametrize(("size", "tokens"), [(2, "replicated"), (4, "scattered")])
def test_generate_chooses_the_unsplit_models_tokens(ranks: Start, models: Path, size: int, tokens: str) -> None:
    """The same prompt on all ranks, or prompts of different lengths: one model, in lockstep to the same last step."""
    options: dict[str, object] = {"tokens": tokens}
    ids = _ids(1) * size
    if tokens == "scattered":
        ids, options = [own[:, : 12 - 3 * rank] for rank, own in enumerate(_ids(size))], {"max_tokens": 2 * 12}
    found = ranks(size).run(_generated, models / "fp32", models / f"fp32-tp{size}", ids, options)
    assert found == [_greedy(_whole(models / "fp32"), own) for own in ids]


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))


def _facts(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype, str]]:
    return {
        name: (tuple(t.shape), t.dtype, sha256(plain(t).contiguous().view(torch.uint8).numpy()).hexdigest())
        for name, t in tensors.items()
    }


def _held(group: dist.ProcessGroup, how: str, model: Path, shards: Path) -> tuple[Any, list[str], bool]:
    """(every tensor, the types of `mlp`, whether all that was not replaced are the objects that they were)."""
    whole = AutoModelForCausalLM.from_pretrained(model) if how == "attach" else None
    before = _tensors(whole) if whole is not None else {}
    split_model = attach(whole, shards, group) if whole is not None else load_model(model, shards, group)
    after = _tensors(split_model)
    same = all(after[name] is tensor for name, tensor in before.items() if name in after and not _of_dense(name))
    return _facts(after), [type(layer.mlp).__name__ for layer in split_model.model.layers], same


def _of_dense(name: str) -> bool:
    return name.startswith(tuple(f"model.layers.{index}.mlp." for index in range(DENSE)))


@pytest.mark.parametrize(("size", "how"), [(2, "attach"), (4, "load_model")])
def test_only_dense_layers_are_replaced(ranks: Start, models: Path, size: int, how: str) -> None:
    whole = _facts(_tensors(AutoModelForCausalLM.from_pretrained(models / "bf16")))
    dense = {
        f"model.layers.{i}.mlp.{linear}.weight": shape
        for i in range(DENSE)
        for linear, shape in (
            ("gate_up_proj", (2 * INTERMEDIATE // size, HIDDEN)),
            ("down_proj", (HIDDEN, INTERMEDIATE // size)),
        )
    }
    elements = sum(torch.Size(fact[0]).numel() for name, fact in whole.items() if _of_dense(name))
    assert size * sum(torch.Size(shape).numel() for shape in dense.values()) == elements
    for found, kinds, same in ranks(size).run(_held, how, models / "bf16", models / f"bf16-tp{size}"):
        assert kinds == ["DenseFFN"] * DENSE + ["DeepseekV3MoE"]
        assert {name: fact for name, fact in found.items() if not _of_dense(name)} == {
            name: fact for name, fact in whole.items() if not _of_dense(name)
        }
        assert {name: fact[:2] for name, fact in found.items() if _of_dense(name)} == {
            name: (shape, torch.bfloat16) for name, shape in dense.items()
        }
        assert same


def _loaded(group: dist.ProcessGroup, model: Path, shards: Path, ids: list[torch.Tensor]) -> tuple[Any, list[str]]:
    records = Records()
    logging.getLogger("transformers").addHandler(records)
    try:
        return _logits(group, "load_model", model, shards, ids, {}), records.messages
    finally:
        logging.getLogger("transformers").removeHandler(records)


def test_load_model_passes_over_the_full_dense_weights(ranks: Start, models: Path, tmp_path: Path) -> None:
    """They are NaN here, after the split, and nothing is said of tensors that are there and not in the model."""
    poisoned, ids = shutil.copytree(models / "fp32", tmp_path / "poisoned"), _ids(2)
    for path in poisoned.glob("*.safetensors"):
        tensors = read_safetensors(path)
        nan = {name: (kind, shape, b"\xff" * len(data)) for name, (kind, shape, data) in dense_only(tensors).items()}
        write_safetensors(path, tensors | nan, {"format": "pt"})
    assert _whole_logits(poisoned, ids).isnan().all()
    wanted = ranks(2).run(_loaded, models / "fp32", models / "fp32-tp2", ids)
    for (found, said), (logits, _) in zip(
        ranks(2).run(_loaded, poisoned, models / "fp32-tp2", ids), wanted, strict=True
    ):
        assert torch.equal(found, logits)
        assert said == []


def _status(key: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) * 1024


@torch.inference_mode()
def _memory(group: dist.ProcessGroup, small: Path, big: Path) -> dict[str, int]:
    """What this process takes, in bytes; `small` and `big` are folders with their shards in `<folder>-tp<R>`."""
    ids = torch.arange(8)[None]
    shards = [folder.with_name(f"{folder.name}-tp{group.size()}") for folder in (small, big)]
    for how in ("load_model", "attach"):  # what is imported and made once
        _split_model(how, small, shards[0], group)(ids)
    start = _status("VmRSS")
    model = load_model(big, shards[1], group)
    loaded = _status("VmHWM")
    model(ids)
    ran = _status("VmHWM")
    # On the CPU, from_pretrained maps the files: the copy is memory of the process's own.
    whole = copy.deepcopy(AutoModelForCausalLM.from_pretrained(big))
    before = _status("RssAnon")
    attach(whole, shards[1], group)(ids)
    return {"loading": loaded - start, "running": ran - start, "let go": before - _status("RssAnon")}


@pytest.fixture
def new_processes() -> Iterator[Start]:
    started: list[Ranks] = []

    def of(size: int) -> Ranks:
        started.append(Ranks(size))
        return started[-1]

    yield of
    for group in started:
        group.stop()


@pytest.mark.slow
def test_full_weights_are_not_held(new_processes: Start, models: Path, tmp_path: Path) -> None:
    # Matrices of 32 MB, which glibc maps, and gives back when they are freed.
    big = {"hidden_size": 1024, "intermediate_size": 16384, "num_hidden_layers": 3}
    _model(**big).bfloat16().save_pretrained(tmp_path / "big")
    split(tmp_path / "big", tmp_path / "big-tp2", Cut(2))
    full = 3 * 3 * 1024 * 16384 * 2
    for held in new_processes(2).run(_memory, models / "bf16", tmp_path / "big"):
        # The rank's half, and one of the three layers a second time, while it is put in order for the product.
        assert 0.4 * full < held["loading"] < 0.7 * full
        assert 0.4 * full < held["running"] < 0.7 * full
        assert 0.4 * full < held["let go"] < 0.6 * full  # all of it, and the rank's half is in its place


@dataclass(frozen=True)
class Refused:
    """What `attach` is given in place of what fits, on both ranks or, `only`, on rank 1; and what it says."""

    message: str
    kinds: tuple[str, str] = ("ShardError", "ShardError")
    model: dict[str, Any] = field(default_factory=dict)
    shards: str = "bf16-tp2"
    options: dict[str, Any] = field(default_factory=dict)
    loaded: int | None = None  # a Shard of the rank that is so many further
    twice: bool = False
    only: bool = False


GROUP, ONE = ("GroupError", "GroupError"), ("GroupError", "ShardError")
REFUSED = {
    "sizes": Refused(r"are \(256, 512\), model.layers.0.mlp's are \(256, 1024\)", model={"intermediate_size": 1024}),
    "dense layers": Refused(r"are \[0, 1, 2\], DeepseekV3.*'s are \[0, 1\]", model={"first_k_dense_replace": 2}),
    "activation": Refused(
        r"layer 0's activation is silu, model.layers.0.mlp computes another: of gate .* cut the set from this model's",
        model={"hidden_act": "gelu"},
    ),
    "twice": Refused("model.layers.0.mlp is split already", twice=True),
    "another rank's": Refused(r"rank (0|1)'s shard, and this is rank (?!\1)", GROUP, loaded=1),
    "set of another size": Refused("cut for tp_size 4, the group's size is 2", shards="bf16-tp4"),
    "shard of another size": Refused("one of 4, and a group of 2 was given", GROUP, shards="bf16-tp4", loaded=0),
    "type": Refused("weights are not cast", ("UsageError", "UsageError"), options={"dtype": torch.float32}),
    "missing on rank 1": Refused("denseffn-rank-00001.*cannot be read", ONE, shards="missing"),
    "activation of rank 1": Refused("activation is silu, .* another", ONE, model={"hidden_act": "gelu"}, only=True),
    "option of rank 1": Refused(
        "max_tokens is None on rank 0 .* and 4 on", GROUP, options={"max_tokens": 4}, only=True
    ),
    "set of rank 1": Refused("shard set is '.*' on rank 0 .* and '.*' on", GROUP, shards="w8a8-tp2", only=True),
}


def _tried(group: dist.ProcessGroup, case: Refused, models: Path) -> tuple[str, str, bool]:
    """(type and message of what was raised, whether the model is as it was)."""
    if case.only and group.rank() == 0:
        case = Refused(case.message)
    model = _model(**case.model).bfloat16()
    shards: Path | Shard = models / case.shards
    if case.loaded is not None:
        shards = load_shard(models / case.shards, (group.rank() + case.loaded) % group.size())
    if case.twice:
        attach(model, shards, group)
    before = [layer.mlp for layer in model.model.layers], _facts(_tensors(model))
    try:
        attach(model, shards, group, **case.options)
    except ReshardError as raised:
        after = [layer.mlp for layer in model.model.layers], _facts(_tensors(model))
        return type(raised).__name__, str(raised), after == before
    return "nothing", "", False


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_all_ranks_with_the_model_as_it_was(ranks: Start, models: Path, case: str) -> None:
    refused = REFUSED[case]
    found = ranks(2).run(_tried, refused, models)
    assert tuple(kind for kind, _, _ in found) == refused.kinds
    for _, text, as_it_was in found:
        assert re.search(refused.message, text)
        assert as_it_was


@pytest.mark.parametrize("how", ["attach", "load_model"])
def test_a_model_with_biases_is_refused(models: Path, tmp_path: Path, how: str) -> None:
    """Shard sets hold none."""
    LlamaForCausalLM(LlamaConfig(**LLAMA, mlp_bias=True)).save_pretrained(tmp_path / "biased")
    with pytest.raises(ShardError, match=r"model.layers.0.mlp.*bias"):
        _split_model(how, tmp_path / "biased", models / "llama-tp1", None)


def _not_there(group: dist.ProcessGroup, model: Path, shards: Path) -> tuple[str, str]:
    try:
        load_model(model if group.rank() == 0 else model / "missing", shards, group)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def test_a_model_that_one_rank_cannot_load_is_an_error_on_all(ranks: Start, models: Path) -> None:
    first, second = ranks(2).run(_not_there, models / "bf16", models / "bf16-tp2", timeout=20)
    assert first[0] == "GroupError"
    assert second[1] in first[1]


@pytest.mark.parametrize(
    ("told", "made", "said"),
    [
        ("x" * 300, None, "transformers takes xxx"),  # no name that a file system takes
        ("x.safetensors.index.json", os.mkfifo, "x.safetensors.index.json is a FIFO, expected a file"),
        ("x.safetensors.index.json", Path.mkdir, "x.safetensors.index.json is a folder, expected a file"),
    ],
)
def test_what_config_json_names_may_be_anything(
    models: Path, tmp_path: Path, told: str, made: Callable[[Path], None] | None, said: str
) -> None:
    """`transformers_weights` is looked at before transformers reads it."""
    shutil.copytree(models / "llama", tmp_path / "model")
    if made is not None:
        made(tmp_path / "model" / told)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "transformers_weights": told}))
    with pytest.raises(ShardError, match=said):
        load_model(tmp_path / "model", models / "llama-tp1")


@pytest.mark.parametrize("single", ["model.safetensors", "tuned.safetensors"])
def test_load_model_takes_one_account_of_the_weights(single: str, tmp_path: Path) -> None:
    """Two trainings in one folder: transformers takes the single file, or what config.json names, and not the index."""
    model = tmp_path / "model"
    old, new = (LlamaForCausalLM(LlamaConfig(**LLAMA)) for _ in range(2))
    old.save_pretrained(model, max_shard_size="200KB")
    new.save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / "model.safetensors", model / single)
    index = "model.safetensors.index.json"
    if single != "model.safetensors":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "transformers_weights": single}))
    for told, name in ((index, "of-old"), (single, "of-new")):
        assert reshard("split", model, tmp_path / name, "--tp", 1, "--index", told, "--quiet").code == 0
    with pytest.raises(ShardError) as caught:
        load_model(model, tmp_path / "of-old")
    for text in (f"transformers takes {single}, the shards were cut from model-0", f"--index {single}"):
        assert text in str(caught.value)
    ids = _ids(1)[0]
    with torch.inference_mode():
        whole = load_model(model, tmp_path / "of-new"), new.eval(), old.eval()
        found, wanted, other = (one(ids).logits.flatten(0, 1) for one in whole)
    assert error(found, wanted.double()) <= FLOAT32_BOUND < error(other, wanted.double())
