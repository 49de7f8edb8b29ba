"""Which modules a quantization_config leaves alone, method by method, each as its library matches names."""

from typing import Any

import pytest

from reshard.errors import SourceError
from reshard.quantization import Accounts, list_accounts
from reshard.quantization.names import at_boundary

GATE = "model.layers.0.mlp.gate_proj"
DOWN = "model.layers.1.mlp.down_proj"


def key(method: str, module: str = GATE, wrapped: bool = False, **values: Any) -> str | None:
    """The key that leaves the module alone."""
    quantization = {"quant_method": method, "weight_block_size": [128, 128], **values}
    config: dict[str, Any] = {"quantization_config": quantization}
    if wrapped:
        config = {"text_config": {"num_hidden_layers": 2, **config}}
    (account,) = list_accounts(Accounts(config))
    declared = account.declare(module)
    assert declared is not None
    if declared.kind != "FLOAT":
        return None
    return declared.said_by.rpartition("quantization_config.")[2].rstrip(")")


TARGETED: dict[str, Any] = {
    "quant_algo": "FP8",
    "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}},
}
STACKING = [
    ("fp8", "modules_to_not_convert"),
    ("compressed-tensors", "ignore"),
    ("modelopt", "exclude_modules"),
    ("quark", "exclude"),
    ("awq", "modules_to_not_convert"),
]


@pytest.mark.parametrize(
    ("method", "name", "entries"),
    [
        ("fp8", "modules_to_not_convert", ["model.layers.0"]),
        ("fp8", "modules_to_not_convert", ["gate_proj"]),
        ("fp8", "modules_to_not_convert", ["mlp.gate_proj"]),
        ("fp8", "modules_to_not_convert", [r"model\.layers\.[0-2]\.mlp"]),
        ("fp8", "modules_to_not_convert", ["lm_head", "model.layers.*.mlp"]),
        ("fp8", "ignored_layers", [GATE]),
        ("blockwise_int8", "ignored_layers", ["model.layers.0.mlp"]),
        ("w8a8_int8", "ignore", [GATE]),
        ("compressed-tensors", "ignore", [r"re:.*mlp\.(gate|up|down)_proj$"]),
        ("compressed-tensors", "ignore", ["Linear"]),
        ("modelopt", "ignore", ["model.layers.0*"]),
        ("modelopt", "ignore", ["*.mlp.gate_proj"]),
        ("modelopt", "exclude_modules", ["model.layers.0.mlp"]),
        ("modelopt_fp4", "ignore", ["model.layers.0*"]),
        ("quark", "exclude", [GATE]),
        ("quark", "exclude", ["*gate_proj"]),
        ("quark", "exclude", [r"re:model\.layers\.0.*"]),
        ("awq", "modules_to_not_convert", ["layers.0."]),
        ("awq", "modules_to_not_convert", ["mlp.gate_proj"]),
        ("bitsandbytes", "llm_int8_skip_modules", ["mlp"]),
        ("bitsandbytes", "llm_int8_skip_modules", ["model.layers.0"]),
        ("fbgemm_fp8", "modules_to_not_convert", ["model.layers.0.mlp"]),
        ("hqq", "skip_modules", ["gate_proj"]),
        ("aqlm", "linear_weights_not_to_quantize", [f"{GATE}.weight"]),
        ("gptq", "dynamic", {r"-:.*\.layers\.0\..*": {}}),
        ("gptq", "dynamic", {r"+:.*down_proj": {"bits": 8}, r"-:.*gate_proj": {}}),
        ("gptq", "modules_in_block_to_quantize", [["self_attn.k_proj"], ["mlp.down_proj"]]),
        ("gptq", "modules_in_block_to_quantize", ["self_attn.k_proj"]),
        ("quark", "layer_quant_config", {"*gate_proj": {"weight": None}, "*": {"weight": {}}}),
        ("quark", "layer_quant_config", {GATE: None}),
        *((m, k, ["model.layers.0.mlp.gate_up_proj"]) for m, k in STACKING),
        ("compressed-tensors", "ignore", [r"re:.*gate_up_proj$"]),
        ("auto-round", "extra_config", {GATE: {"bits": 16}}),
        ("auto-round", "extra_config", {r".*layers\.0\.mlp.*": {"bits": 16, "data_type": "float"}}),
        ("auto-round", "block_name_to_quantize", "model.layers.3,model.layers.4"),
        ("auto-round", "to_quant_block_names", ["model.layers.1"]),
        ("a method of tomorrow", "modules_to_not_convert", ["model.layers.0.mlp"]),
        ("a method of tomorrow", "exclude_modules", ["model.layers.0*"]),
    ],
    ids=str,
)
def test_left_alone(method: str, name: str, entries: Any) -> None:
    groups: dict[str, Any] = {"config_groups": {}} if method == "compressed-tensors" else {}
    assert key(method, **groups | {name: entries}) == name


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("fp8", {"modules_to_not_convert": ["model.layers.0.mlp.gate"]}),  # the router's name
        ("fp8", {"modules_to_not_convert": ["model.layers.00", "lm_head", "gate"]}),
        ("fp8", {"exclude_modules": ["model.layers.0*"]}),  # ModelOpt's key
        ("fp8", {"ignored_layers": ["re:mlp", f"{GATE}_2"]}),  # from the name's start, as the tools match
        ("w8a8_int8", {"ignore": ["re:mlp", "model.layers.0.mlp.gate", f"{GATE}_2"]}),
        ("compressed-tensors", {"ignore": ["re:mlp", "model.layers.0.mlp.gate", f"{GATE}_2"], **TARGETED}),
        ("w8a8_int8", {"ignore": ["model.layers.0.mlp"]}),
        ("modelopt", {"ignore": ["model.layers.1*", "*self_attn*"], "quant_algo": "NVFP4"}),
        ("quark", {"exclude": ["lm_head", "model.layers.0.mlp.gate"]}),
        ("awq", {"modules_to_not_convert": ["self_attn", "visual"]}),
        ("bitsandbytes", {"llm_int8_skip_modules": ["lm_head", "gate"]}),
        ("gptq", {"dynamic": {r"+:.*gate_proj": {"bits": 8}, r"-:.*down_proj": {}}}),
        ("gptq", {"modules_in_block_to_quantize": [["mlp.gate_proj", "mlp.up_proj"]]}),
        ("auto-round", {"extra_config": {GATE: {"bits": 8}, DOWN: {"bits": 16}}}),
        ("auto-round", {"block_name_to_quantize": "model.layers"}),
        ("aqlm", {"linear_weights_not_to_quantize": [f"{DOWN}.weight"]}),
    ],
    ids=str,
)
def test_quantized(method: str, values: dict[str, Any]) -> None:
    assert key(method, **values) is None


@pytest.mark.parametrize("entry", ["model.layers.0.mlp.gate_proj", "language_model.model.layers.0.mlp.gate_proj"])
@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_wrapper_s_modules_have_several_names(prefix: str, entry: str) -> None:
    """transformers 5 saves under other names than those that a tool wrote into the config."""
    module = f"{prefix}layers.0.mlp.gate_proj"
    assert key("compressed-tensors", module, config_groups={}, ignore=[entry], wrapped=True) == "ignore"
    assert key("fp8", f"{prefix}layers.1.mlp.gate_proj", ignored_layers=[entry], wrapped=True) is None


@pytest.mark.parametrize(
    ("method", "values", "says"),
    [
        ("gptq", {"modules_in_block_to_quantize": 3}, "modules_in_block_to_quantize is not a list of names"),
        ("gptq", {"dynamic": ["-:x"]}, "dynamic is not an object"),
        ("gptq", {"dynamic": {"-:(": {}}}, "'re:(' is not a pattern"),
        ("auto-round", {"extra_config": [GATE]}, "extra_config is not an object"),
        ("modelopt", {"ignore": "model.layers.0*"}, "ignore is not a list of names"),
        ("fp8", {"ignored_layers": [1]}, "ignored_layers is not a list of names"),
        ("w8a8_int8", {"ignore": ["re:("]}, "'re:(' is not a pattern"),
        ("compressed-tensors", {"ignore": ["re:a{99999999999}"]}, "'re:a{99999999999}' is not a pattern"),
        ("fp8", {"modules_to_not_convert": ["*.mlp"]}, "'*.mlp' is not a pattern"),
    ],
    ids=str,
)
def test_lists_that_are_none(method: str, values: dict[str, Any], says: str) -> None:
    with pytest.raises(SourceError) as caught:
        key(method, **values)
    assert str(caught.value).startswith("config.json: quantization_config")
    assert says in str(caught.value)


ENTRIES = [
    "lm_head",
    "gate",
    "mlp.gate",
    "gate_proj",
    "model.layers.0",
    "model.layers.*.mlp",
    "layers.0",
    "mlp",
    "proj",
]
MODULES = [GATE, DOWN, "model.layers.10.mlp.gate_proj", "model.layers.0.mlp.gate", "lm_head"]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("module", MODULES)
def test_as_transformers_matches(entry: str, module: str) -> None:
    should_convert = pytest.importorskip("transformers.quantizers.quantizers_utils").should_convert_module
    assert at_boundary(entry, module) == (not should_convert(module, [entry]))


@pytest.mark.parametrize(("method", "name"), STACKING)
def test_stacked_gate_and_up_are_left_alone_where_both_are(method: str, name: str) -> None:
    stacked = "model.layers.0.mlp.gate_up_proj"
    both = [GATE, GATE.replace("gate", "up")]
    assert key(method, stacked, **TARGETED | {name: both}) == name
    assert key(method, stacked, **TARGETED | {name: both[:1]}) is None
    assert key(method, stacked, **TARGETED | {name: [stacked]}) == name
    assert key(method, "model.layers.0.mlp.down_proj", **TARGETED | {name: [stacked, *both]}) is None


@pytest.mark.parametrize("name", ["fqn_to_config", "module_fqn_to_config"])
@pytest.mark.parametrize(
    ("entries", "plain"),
    [
        ({GATE: None, "_default": {"_type": "Int4WeightOnlyConfig"}}, True),
        ({r"re:model\.layers\.0\..*": None, "_default": {}}, True),
        ({r"re:model\.layers\.0": None, "_default": {}}, False),
        ({r"re:.*": {}, GATE: None}, True),
        ({GATE: {}, "_default": None}, False),
        ({"_default": None}, True),
        ({DOWN: {}}, True),
    ],
    ids=str,
)
def test_torchao_by_names(name: str, entries: dict[str, Any], plain: bool) -> None:
    quant_type = {"default": {"_type": "FqnToConfig", "_data": {name: entries}}}
    assert key("torchao", quant_type=quant_type) == (f"quant_type.default._data.{name}" if plain else None)


def test_mlx_names_modules_one_by_one() -> None:
    config = {"quantization_config": {"group_size": 64, "bits": 4, GATE: False, DOWN: {"bits": 8}}}
    (account,) = list_accounts(Accounts(config))
    kinds = [declared.kind for module in (GATE, DOWN) if (declared := account.declare(module)) is not None]
    assert kinds == ["FLOAT", "MLX"]


@pytest.mark.parametrize("method", ["mxfp4", "gpt_oss_mxfp4"])
def test_methods_of_experts_alone(method: str) -> None:
    (account,) = list_accounts(Accounts({"quantization_config": {"quant_method": method}}))
    declared = account.declare(GATE)
    assert declared is not None
    assert (declared.kind, declared.said_by) == ("FLOAT", f"config.json (quant_method {method}, of experts alone)")
