"""`reshard synth`: names and sizes of the real checkpoints, values that hold together, safe writing."""

import json
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reshard import limits
from reshard.errors import OutputError, ReshardError, SchemeError, SourceError, SpaceError, UsageError
from reshard.model.config import language_config, read_model_config
from reshard.schemes.table import VARIANTS, Operand
from reshard.source.open import describe, open_source
from reshard.synth.config import _divisor
from reshard.synth.plan import SynthOptions, plan_checkpoint
from reshard.synth.schemes import RECIPES
from reshard.synth.write import SynthResult, Tick, write_checkpoint
from reshard.tensors.numeric import to_f32
from tests.support.builders import Raw, dense_only, read_folder
from tests.support.paths import CONFIGS

MODELS = sorted(path.stem for path in CONFIGS.glob("*.json"))
SMALL = Fraction(1, 64)

# What describe() calls each recipe.
SCHEMES = {variant.name: variant.scheme for variant in VARIANTS} | {"fp16": "bf16", "fp32": "bf16"}
MODELSLIM = {"w8a8_dynamic", "w8a8_static", "w8a8_static_v0", "w8a8_mix", "w8a8_mxfp8"}
_NUMPY = {
    "U8": np.uint8,
    "F8_E8M0": np.uint8,
    "I8": np.int8,
    "I32": np.int32,
    "F32": np.float32,
    "F16": np.float16,
    "F8_E4M3": np.uint8,
    "BF16": np.uint16,
}


def config_of(model: str, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"{model}.json").read_text())
    return config | changes


def array(raw: Raw) -> np.ndarray:
    dtype, shape, data = raw
    return np.frombuffer(data, _NUMPY[dtype]).reshape(shape)


def make(config: dict[str, Any], folder: Path, options: SynthOptions, tick: Tick = lambda nbytes: None) -> SynthResult:
    return write_checkpoint(plan_checkpoint(config, options), folder, tick)


def small(folder: Path, scheme: str, **options: Any) -> dict[str, Raw]:
    """A small R1 of four layers: three dense ones, one mixture, and the MTP layer."""
    make(config_of("deepseek-r1"), folder, SynthOptions(scheme, SMALL, 4, **options))
    return read_folder(folder)


# Names, shapes and types


@pytest.mark.parametrize(
    ("model", "scheme", "tensors", "parameters", "extra"),
    [
        # As published: tensors of the index, parameters (block scales counted) of the headers.
        ("deepseek-r1", "fp8_block", 91_991, 684_531_386_000, {}),
        ("deepseek-v3", "fp8_block", 91_991, 684_531_386_000, {}),
        ("kimi-k2", "fp8_block", 139_644, 1_026_470_731_056, {}),
        ("deepseek-v2-lite", "bf16", 5_291, 15_706_484_224, {}),
        ("glm-4.5", "bf16", 44_691, 358_337_791_296, {}),
        ("llama-3.1-8b", "bf16", 291, 8_030_261_248, {}),
        # DeepSeek V3.2: the same and an indexer in every layer.
        (
            "deepseek-v3",
            "fp8_block",
            92_425,
            685_396_921_376,
            {"model_type": "deepseek_v32", "index_n_heads": 64, "index_head_dim": 128},
        ),
    ],
)
def test_real_counts(model: str, scheme: str, tensors: int, parameters: int, extra: dict[str, Any]) -> None:
    plan = plan_checkpoint(config_of(model, **extra), SynthOptions(scheme))
    everything = [tensor for file in plan.files for tensor in file.tensors]
    assert len(everything) == len({tensor.name for tensor in everything}) == tensors
    assert sum(prod(tensor.shape) for tensor in everything) == parameters


def test_r1_types_are_the_published_ones() -> None:
    plan = plan_checkpoint(config_of("deepseek-r1"), SynthOptions("fp8_block"))
    elements: dict[str, int] = {}
    for file in plan.files:
        for tensor in file.tensors:
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + prod(tensor.shape)
    assert elements == {"BF16": 3_918_786_560, "F8_E4M3": 680_571_043_840, "F32": 41_555_600}
    assert len(plan.files) == 163


def test_attention_follows_the_family() -> None:
    def names(model: str, **changes: Any) -> set[str]:
        plan = plan_checkpoint(config_of(model, **changes), SynthOptions(scale=SMALL, layers=1))
        prefix = "model.layers.0.self_attn."
        return {t.name.removeprefix(prefix) for file in plan.files for t in file.tensors if t.name.startswith(prefix)}

    weights = {f"{role}_proj.weight" for role in "qkvo"}
    biases = {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
    assert names("llama-3.1-8b") == weights
    assert names("llama-3.1-8b", attention_bias=True) == weights | biases | {"o_proj.bias"}
    assert names("llama-3.1-8b", model_type="qwen2") == weights | biases
    assert names("llama-3.1-8b", model_type="qwen3") == weights | {"q_norm.weight", "k_norm.weight"}
    assert names("glm-4.5") == weights | biases | {"q_norm.weight", "k_norm.weight"}
    assert names("glm-4.5", use_qk_norm=False) == weights | biases
    latent = {"kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight", "o_proj.weight"}
    low_rank = {"q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight"}
    assert names("deepseek-v2-lite") == latent | {"q_proj.weight"}
    assert names("deepseek-r1") == latent | low_rank
    assert names("kimi-k2") == latent | low_rank | {"rotary_emb.inv_freq"}


@pytest.mark.parametrize(
    ("model", "tied", "head"),
    [
        ("llama-3.1-8b", True, []),
        ("llama-3.1-8b", False, ["lm_head.weight"]),
        ("glm-4.5v", False, ["lm_head.weight"]),
        ("kimi-k2.5", False, ["language_model.lm_head.weight"]),
    ],
)
def test_the_head_stands_beside_the_model_or_at_the_top(model: str, tied: bool, head: list[str]) -> None:
    config = config_of(model, tie_word_embeddings=tied) if tied else config_of(model)
    plan = plan_checkpoint(config, SynthOptions(scale=SMALL, layers=1))
    names = [tensor.name for file in plan.files for tensor in file.tensors]
    assert [name for name in names if "lm_head" in name] == head


def test_modelslim_leaves_what_its_recipes_leave(tmp_path: Path) -> None:
    small(tmp_path, "w8a8_dynamic", sparse=True)
    types = json.loads((tmp_path / "quant_model_description.json").read_text())
    held = set(read_folder(tmp_path))
    assert held == {name for name in types if "." in name}
    layer = "model.layers.3"
    assert types[f"{layer}.self_attn.kv_b_proj.weight"] == "FLOAT"
    assert types[f"{layer}.mlp.gate.weight"] == "FLOAT"
    assert types["model.layers.4.eh_proj.weight"] == types["lm_head.weight"] == "FLOAT"
    for module in ("self_attn.o_proj", "mlp.experts.0.up_proj", "mlp.shared_experts.down_proj"):
        assert types[f"{layer}.{module}.weight"] == types[f"{layer}.{module}.weight_offset"] == "W8A8_DYNAMIC"


@pytest.mark.parametrize("scheme", RECIPES)
def test_files_are_named_as_the_tool_names_them(tmp_path: Path, scheme: str) -> None:
    small(tmp_path, scheme, shards=2, sparse=True)
    modelslim = scheme in MODELSLIM
    stem = "quant_model_weights" if modelslim else "model"
    expected = {f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)}
    expected |= {"config.json", f"{stem}.safetensors.index.json"}
    expected |= {"quant_model_description.json"} if modelslim else set()
    assert {path.name for path in tmp_path.iterdir()} == expected
    config = json.loads((tmp_path / "config.json").read_text())
    assert ("quantization_config" in config) == (not modelslim and scheme not in {"bf16", "fp16", "fp32"})
    assert config["torch_dtype"] == {"fp16": "float16", "fp32": "float32"}.get(scheme, "bfloat16")


# Read back


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scheme", RECIPES)
def test_reads_back(tmp_path: Path, scheme: str, model: str) -> None:
    config = config_of(model)
    make(config, tmp_path / "out", SynthOptions(scheme, SMALL, 4, sparse=True))
    with open_source(str(tmp_path / "out")) as source:
        checkpoint = describe(source)
    written = json.loads((tmp_path / "out/config.json").read_text())
    (_, language), (_, before) = language_config(written), language_config(config)
    assert frozenset(layer.index for layer in checkpoint.layers) == read_model_config(written).dense_layers
    linears = [linear for layer in checkpoint.layers for linear in layer.linears.values()]
    assert {linear.variant.scheme for linear in linears} == {SCHEMES[scheme]}
    assert checkpoint.model.hidden_size == language["hidden_size"] < before["hidden_size"]
    assert checkpoint.warnings == ()


@pytest.mark.parametrize("scheme", RECIPES)
def test_safetensors_opens_it(tmp_path: Path, scheme: str) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors")
    tensors = small(tmp_path, scheme, shards=2)
    seen = set()
    for path in sorted(tmp_path.glob("*.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 -- not a mapping
                tensor = file.get_tensor(name)
                assert tuple(tensor.shape) == tensors[name][1]
                assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == tensors[name][2]
                seen.add(name)
    index = json.loads(next(tmp_path.glob("*.index.json")).read_text())
    assert seen == set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors.values())


# Values


@pytest.mark.parametrize("scheme", RECIPES)
def test_values_are_sane(tmp_path: Path, scheme: str) -> None:
    for name, raw in small(tmp_path, scheme).items():
        values = to_f32(array(raw), raw[0])
        assert np.isfinite(values).all(), name
        if "scale" in name:
            assert (values > 0).all(), name
            assert (values < 0.1).all(), name
        elif name.endswith("norm.weight"):
            assert (np.abs(values - 1) < 0.5).all(), name
        elif name.endswith("weight_offset"):
            assert not values.any(), name
        elif raw[0] == "I8" and name.endswith("weight"):
            assert (values.min(), values.max()) == (-128, 127), name
        elif name.endswith("weight") and values.size > 1000:
            wanted = 64 if raw[0] == "F8_E4M3" else 0.02
            assert abs(values.std() / wanted - 1) < 0.1, name
            assert abs(values.mean()) < 0.2 * wanted, name


@pytest.mark.parametrize("scheme", ["w8a8_static", "w8a8_mix"])
def test_static_values_hold_together(tmp_path: Path, scheme: str) -> None:
    tensors = small(tmp_path, scheme)
    modules = sorted(name.removesuffix(".quant_bias") for name in tensors if name.endswith(".quant_bias"))
    assert "model.layers.0.mlp.down_proj" in modules
    assert "model.layers.3.mlp.experts.1.gate_proj" in modules
    for module in modules:
        q = array(tensors[f"{module}.weight"]).astype(np.int64)
        scale, offset = array(tensors[f"{module}.input_scale"]), array(tensors[f"{module}.input_offset"])
        assert offset[0] != 0
        expected = np.round(-q.sum(axis=1) * np.float64(offset[0]))
        assert np.array_equal(array(tensors[f"{module}.quant_bias"]), expected), module
        if scheme == "w8a8_mix":
            product = scale * array(tensors[f"{module}.weight_scale"])[:, 0]
            assert np.array_equal(array(tensors[f"{module}.deq_scale"]), product), module
        if module.endswith(".up_proj"):
            gate = module.replace(".up_proj", ".gate_proj")
            for suffix in ("input_scale", "input_offset"):
                assert tensors[f"{gate}.{suffix}"] == tensors[f"{module}.{suffix}"]
            assert tensors[f"{gate}.weight"] != tensors[f"{module}.weight"]


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block", "w8a8_mix"])
def test_a_seed_and_a_name_give_the_values(tmp_path: Path, scheme: str) -> None:
    whole = small(tmp_path / "a", scheme, shards=1)
    again = small(tmp_path / "b", scheme, shards=1)
    in_seven = small(tmp_path / "c", scheme, shards=7)
    dense = small(tmp_path / "d", scheme, dense_only=True)
    other = small(tmp_path / "e", scheme, seed=1)
    assert [p.read_bytes() for p in sorted((tmp_path / "a").iterdir())] == [
        p.read_bytes() for p in sorted((tmp_path / "b").iterdir())
    ]
    assert whole == again == in_seven
    assert dense == dense_only(whole)
    assert not [n for n, raw in whole.items() if raw == other[n] and raw[0] != "F32" and len(raw[2]) > 8]


def test_long_tensors_are_drawn_in_blocks() -> None:
    """The blocks of a tensor larger than one are different, and of whole rows."""
    from reshard.synth.schemes import TensorSpec
    from reshard.synth.values import blocks

    tensor = TensorSpec("model.layers.0.mlp.gate_proj.weight", "I8", (3000, 1000), Operand.WEIGHT, (3000, 1000))
    made = list(blocks(tensor, 0))
    assert [block.shape for block in made] == [(1048, 1000), (1048, 1000), (904, 1000)]
    assert not np.array_equal(made[0], made[1])
    bias = TensorSpec("model.layers.0.mlp.gate_proj.quant_bias", "I32", (3000,), Operand.BIAS, (3000, 1000))
    offset = TensorSpec("model.layers.0.mlp.gate_proj.input_offset", "F32", (1,), Operand.INPUT_OFFSET, (3000, 1000))
    sums = np.concatenate(made).sum(axis=1, dtype=np.int64)
    (value,) = next(iter(blocks(offset, 0)))
    assert np.array_equal(np.concatenate(list(blocks(bias, 0))), -sums * int(value))


# Sizes


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scale", ["1/2", "1/3", "1/16", "1/100", "1/5000"])
def test_scaled_sizes_make_sense(model: str, scale: str) -> None:
    config = config_of(model)
    plan = plan_checkpoint(config, SynthOptions(scale=Fraction(scale)))
    _, before = language_config(config)
    _, config = language_config(json.loads(plan.side_files["config.json"]))
    assert config["hidden_size"] % 16 == 0
    assert config["intermediate_size"] % 128 == 0
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["vocab_size"] < before["vocab_size"]
    assert config["num_hidden_layers"] == before["num_hidden_layers"]
    for key in ("bos_token_id", "eos_token_id"):
        ids = config.get(key, 0)
        assert max(ids if isinstance(ids, list) else [ids]) < config["vocab_size"]
    if "n_routed_experts" in config:
        experts, groups = config["n_routed_experts"], config["n_group"]
        assert config["moe_intermediate_size"] % 16 == 0
        assert experts % groups == 0
        assert groups == 1 or experts // groups >= 2
        assert 1 <= config["num_experts_per_tok"] <= config["topk_group"] * experts // groups <= experts
    ratio = config["hidden_size"] / before["hidden_size"]
    assert ratio == pytest.approx(float(Fraction(scale)), rel=0.05) or config["hidden_size"] <= 128


def test_full_scale_changes_only_the_quantization() -> None:
    config = config_of("deepseek-v2-lite")  # its intermediate size, 10944, is no multiple of 128
    plan = plan_checkpoint(config, SynthOptions())
    assert json.loads(plan.side_files["config.json"]) == config
    r1 = config_of("deepseek-r1")
    assert json.loads(plan_checkpoint(r1, SynthOptions("fp8_block")).side_files["config.json"]) == r1


def test_first_layers(tmp_path: Path) -> None:
    make(config_of("deepseek-r1"), tmp_path, SynthOptions(scale=SMALL, layers=2, sparse=True))
    names = set(read_folder(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["first_k_dense_replace"]) == (2, 2)
    assert {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")} == {0, 1, 2}
    assert "model.layers.2.mlp.experts.0.gate_proj.weight" in names  # the MTP layer
    assert "model.layers.2.eh_proj.weight" in names
    assert "model.layers.1.mlp.gate_proj.weight" in names


def test_layer_lists_are_cut() -> None:
    types = ["dense", "sparse"] * 46
    config = config_of("glm-4.5", mlp_layer_types=types, layer_types=["full_attention"] * 92)
    plan = plan_checkpoint(config, SynthOptions(scale=SMALL, layers=3))
    written = json.loads(plan.side_files["config.json"])
    assert written["mlp_layer_types"] == ["dense", "sparse", "dense"]
    assert read_model_config(written).dense_layers == frozenset({0, 2})


def test_dense_only_of_r1_is_what_the_split_reads() -> None:
    plan = plan_checkpoint(config_of("deepseek-r1"), SynthOptions(dense_only=True, shards=3))
    tensors = [tensor for file in plan.files for tensor in file.tensors]
    assert sorted(tensor.name for tensor in tensors) == sorted(
        f"model.layers.{layer}.mlp.{role}_proj.weight" for layer in (0, 1, 2) for role in ("gate", "up", "down")
    )
    assert sum(tensor.nbytes for tensor in tensors) == 2_378_170_368
    assert [len(file.tensors) for file in plan.files] == [3, 3, 3]


# Files


def test_sparse_r1(tmp_path: Path) -> None:
    ticks: list[int] = []
    result = make(config_of("deepseek-r1"), tmp_path, SynthOptions("fp8_block", sparse=True), tick=ticks.append)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == result.files == len(ticks) == 163
    assert (result.tensors, result.tensor_bytes) == (91_991, 688_574_839_360)
    assert sum(path.stat().st_size for path in files) == result.size == sum(ticks)
    # As published 688,586,727,753 bytes: the rest is how the headers are spelt.
    assert abs(result.size - 688_586_727_753) < 1_000_000
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) < 64 << 20
    sizes = [path.stat().st_size for path in files]
    assert max(sizes) < 1.5 * result.size / 163


@pytest.mark.parametrize("shards", [1, 2, 5, 40, 85])
def test_any_number_of_files(tmp_path: Path, shards: int) -> None:
    config = config_of("deepseek-r1", n_routed_experts=16, n_group=1, topk_group=1)
    options = SynthOptions(scale=Fraction(1, 128), layers=4, shards=shards, sparse=True)
    result = make(config, tmp_path, options)
    assert result.tensors == 85  # so the largest number gives each a file of its own
    assert len(list(tmp_path.glob("*.safetensors"))) == result.files == shards
    assert all(json.loads(h) for h in map(_header, tmp_path.glob("*.safetensors")))
    with open_source(str(tmp_path)) as source:
        assert describe(source).total_tensors == result.tensors


def _header(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[8 : 8 + int.from_bytes(raw[:8], "little")]


@pytest.mark.parametrize("scheme", ["bf16", "w8a8_mix", "fp8_channel"])
def test_every_tensor_is_aligned(tmp_path: Path, scheme: str) -> None:
    plan = plan_checkpoint(config_of("glm-4.5"), SynthOptions(scheme, SMALL, 4, 3))
    for file in plan.files:
        assert len(file.header) % 8 == 0
        at = len(file.header)
        for tensor in file.tensors:
            assert at % (tensor.nbytes // prod(tensor.shape)) == 0, tensor.name
            at += tensor.nbytes


def test_ticks_add_up(tmp_path: Path) -> None:
    plan = plan_checkpoint(config_of("deepseek-r1"), SynthOptions("w8a8_static", SMALL, 4, 3))
    ticks: list[int] = []
    result = write_checkpoint(plan, tmp_path / "a/b", ticks.append)
    assert sum(ticks) == plan.size == result.size
    assert sum(p.stat().st_size for p in (tmp_path / "a/b").glob("*.safetensors")) == plan.size


def test_a_folder_that_holds_anything_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt.*empty folder"):
        small(tmp_path, "bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(OutputError):
        small(tmp_path / "notes.txt", "bf16")


def test_a_killed_run_does_not_stand_in_the_way(tmp_path: Path) -> None:
    (tmp_path / f".model-00001-of-00001.safetensors.{'0' * 16}.tmp").write_bytes(b"half")
    assert small(tmp_path, "bf16")
    assert not list(tmp_path.glob(".*"))


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    calls = 0

    def fail(nbytes: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise StopError

    plan = plan_checkpoint(config_of("deepseek-r1"), SynthOptions(scale=SMALL, layers=4, shards=3))
    with pytest.raises(StopError):
        write_checkpoint(plan, tmp_path / "new", fail)
    assert not list(tmp_path.iterdir())


def test_a_failure_while_naming_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reshard.writer.folder import OutputFolder

    rename = OutputFolder.rename

    def fail(self: OutputFolder, temporary: Path, name: str) -> None:
        rename(self, temporary, name)
        if "00002" in name:
            raise OSError(5, "Input/output error", str(temporary))

    monkeypatch.setattr(OutputFolder, "rename", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        small(tmp_path, "bf16", shards=3)
    assert not list(tmp_path.iterdir())


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(SpaceError):
        small(tmp_path / "out", "bf16")
    assert not list(tmp_path.iterdir())


# Refusals


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (SynthOptions("w4a8"), SchemeError, "w8a8_static"),
        (SynthOptions(scale=Fraction(0)), UsageError, "scale 0"),
        (SynthOptions(scale=Fraction(2)), UsageError, "scale 2"),
        (SynthOptions(layers=0), UsageError, "61"),
        (SynthOptions(layers=62), UsageError, "61"),
        (SynthOptions(shards=10, dense_only=True), UsageError, "9 tensors"),
        (SynthOptions(shards=-1), UsageError, "shards -1"),
    ],
)
def test_refused_options(options: SynthOptions, error: type[ReshardError], says: str) -> None:
    with pytest.raises(error, match=says):
        plan_checkpoint(config_of("deepseek-r1"), options)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"vocab_size": None}, "vocab_size"),
        ({"v_head_dim": "128"}, "v_head_dim"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({"n_routed_experts": None, "num_local_experts": 8}, "names are not known"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
@pytest.mark.parametrize("scale", [Fraction(1), SMALL])
def test_refused_configs(changes: dict[str, Any], says: str, scale: Fraction) -> None:
    with pytest.raises(SourceError, match=says):
        plan_checkpoint(config_of("deepseek-r1", **changes), SynthOptions(scale=scale, layers=4))


@pytest.mark.parametrize(
    ("bounds", "changes", "says"),
    [
        (
            {"SYNTH_TENSORS": 100},
            {},
            r"more than 100 tensors .* \(up to model\.layers\.3\..*: 101, .*--scale or --layers",
        ),
        ({}, {"hidden_size": 2**31 - 1}, r"or 64 TiB .* \(up to model\.embed_tokens\.weight: 1, "),
        ({}, {"n_shared_experts": 2**31 - 1, "moe_intermediate_size": 2**31 - 1}, "not made .*experts.0.down_proj"),
        ({}, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a whole number from 1 to 1000"),
    ],
)
def test_a_model_that_is_too_large_is_not_even_planned(
    monkeypatch: pytest.MonkeyPatch, bounds: dict[str, int], changes: dict[str, Any], says: str
) -> None:
    for name, value in bounds.items():
        monkeypatch.setattr(limits, name, value)
    with pytest.raises(SourceError, match=says):
        plan_checkpoint(config_of("deepseek-r1", **changes), SynthOptions())


def test_dense_only_of_a_model_without_dense_layers() -> None:
    with pytest.raises(SourceError, match="first_k_dense_replace = 0"):
        plan_checkpoint(config_of("deepseek-r1", first_k_dense_replace=0), SynthOptions(dense_only=True))


@pytest.mark.parametrize(("number", "most", "wanted"), [(2**31 - 1, 2**30, 1), (12, 5, 4), (12, 12, 12), (16, 1, 1)])
def test_the_largest_divisor(number: int, most: int, wanted: int) -> None:
    assert _divisor(number, most) == wanted
