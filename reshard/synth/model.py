"""Every parameter of a model by its config.json: its name in the published checkpoints, its shape, what it is.

H hidden_size, I intermediate_size, E experts. Order: the model's own, with the MTP layers last, as published.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from reshard.errors import SourceError
from reshard.model.config import experts_key, known_dense_layers, read_model_config
from reshard.model.config.values import number
from reshard.model.naming import CONFIG, PREFIX, layer_name
from reshard.model.parts import DENSE_FFN


class Kind(Enum):
    """What a parameter is: this decides whether a tool quantizes it, and what its values are like."""

    LINEAR = "a linear that every tool quantizes"
    ABSORBED = "a linear that ModelSlim's recipes leave out: kv_b_proj and the indexer's"
    HEAD = "a linear that no tool quantizes: routers, output heads, eh_proj"
    EMBEDDING = "token embeddings"
    NORM = "a norm's weight"
    BIAS = "a bias"
    FREQUENCIES = "rotary frequencies, which every engine computes anew"
    ROUTER_BIAS = "e_score_correction_bias, float32 in every checkpoint of DeepSeek"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter under its name, such as `model.norm.weight`; linears are [out, in]."""

    name: str
    shape: tuple[int, ...]
    kind: Kind


@dataclass(frozen=True)
class _Family:
    """What a model type's code fixes and config.json does not say."""

    biased: tuple[str, ...] = ()  # projections that have a bias where `attention_bias` is set
    always_biased: bool = False
    qk_norm: bool = False  # also where `use_qk_norm` is set
    router_bias: bool = False  # unless `topk_method` says otherwise
    frequencies: bool = False


_LATENT = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
_QKV = ("q_proj", "k_proj", "v_proj")
_FAMILIES = {
    "deepseek_v2": _Family(_LATENT),
    "deepseek_v3": _Family(_LATENT, router_bias=True),
    "deepseek_v32": _Family(_LATENT, router_bias=True),
    "kimi_k2": _Family(_LATENT, router_bias=True, frequencies=True),
    "glm4_moe": _Family(_QKV, router_bias=True),
    "glm4v_moe_text": _Family(_QKV, router_bias=True),
    "glm4_moe_lite": _Family(_LATENT, router_bias=True),
    "glm_moe_dsa": _Family(_LATENT, router_bias=True),
    "llama": _Family((*_QKV, "o_proj")),
    "mistral": _Family(),
    "qwen2": _Family(_QKV, always_biased=True),
    "qwen2_moe": _Family(_QKV, always_biased=True),
    "qwen3": _Family((*_QKV, "o_proj"), qk_norm=True),
    "qwen3_moe": _Family((*_QKV, "o_proj"), qk_norm=True),
}


def parameters(config: Mapping[str, Any], prefix: str = PREFIX) -> Iterator[Parameter]:
    """Every parameter of a language model, in its order. Raises SourceError where its config does not give them.

    prefix: what precedes the layers' names.
    """
    return _Model(config, prefix).parameters()


class _Model:
    """A config.json, read for names and shapes; names are those within the module that a method describes."""

    def __init__(self, config: Mapping[str, Any], prefix: str) -> None:
        self._config, self._prefix = config, prefix
        self._model = read_model_config(config)
        if self._model.model_type not in _FAMILIES:
            raise SourceError(
                f"{CONFIG}: model_type {self._model.model_type!r}: its tensors' names are not known here; known are "
                f"{', '.join(sorted(_FAMILIES))}"
            )
        self._family = _FAMILIES[self._model.model_type]
        self._dense = known_dense_layers(self._model)
        self._hidden = self._model.hidden_size
        self._experts = experts_key(config, named=True)

    def parameters(self) -> Iterator[Parameter]:
        first_mtp, prefix = self._model.num_hidden_layers, self._prefix
        table = (self._size("vocab_size"), self._hidden)
        yield Parameter(f"{prefix}embed_tokens.weight", table, Kind.EMBEDDING)
        for layer in range(first_mtp):
            yield from _within(layer_name(prefix, layer), self._layer(dense=layer in self._dense))
        yield from _within(prefix.removesuffix("."), self._norm("norm"))
        if not self._config.get("tie_word_embeddings"):
            # It stands beside the `model` whose layers these are, or at the top.
            above = prefix.removesuffix("model.") if f".{prefix}".endswith(".model.") else ""
            yield Parameter(f"{above}lm_head.weight", table, Kind.HEAD)
        for layer in range(first_mtp, first_mtp + self._model.mtp_layers):
            yield from _within(layer_name(prefix, layer), self._mtp_layer(table))

    def _mtp_layer(self, table: tuple[int, int]) -> Iterator[Parameter]:
        yield Parameter("embed_tokens.weight", table, Kind.EMBEDDING)
        yield from self._norm("enorm")
        yield from self._norm("hnorm")
        yield Parameter("eh_proj.weight", (self._hidden, 2 * self._hidden), Kind.HEAD)
        yield from self._layer(dense=self._experts is None)
        yield from self._norm("shared_head.norm")
        yield Parameter("shared_head.head.weight", table, Kind.HEAD)

    def _layer(self, *, dense: bool) -> Iterator[Parameter]:
        grouped = self._config.get("kv_lora_rank") is None
        yield from _within("self_attn", self._grouped() if grouped else self._latent())
        if dense:
            inner = self._mlp(DENSE_FFN.shared_size(self._model), biased=bool(self._config.get("mlp_bias")))
        else:
            inner = self._mixture()
        yield from _within("mlp", inner)
        yield from self._norm("input_layernorm")
        yield from self._norm("post_attention_layernorm")

    def _grouped(self) -> Iterator[Parameter]:
        """Heads that share keys and values, as in Llama, Qwen and GLM-4.5."""
        heads = self._size("num_attention_heads")
        shared = self._size("num_key_value_heads", heads)
        head = self._size("head_dim", self._hidden // heads)
        yield from self._projection("q_proj", heads * head, self._hidden)
        yield from self._projection("k_proj", shared * head, self._hidden)
        yield from self._projection("v_proj", shared * head, self._hidden)
        yield from self._projection("o_proj", self._hidden, heads * head)
        if self._family.qk_norm or self._config.get("use_qk_norm"):
            yield from self._norm("q_norm", head)
            yield from self._norm("k_norm", head)

    def _latent(self) -> Iterator[Parameter]:
        """Multi-head latent attention, as in DeepSeek V2, V3, R1 and Kimi K2."""
        heads, value = self._size("num_attention_heads"), self._size("v_head_dim")
        plain, rotary = self._size("qk_nope_head_dim"), self._size("qk_rope_head_dim")
        query, key_value = heads * (plain + rotary), self._size("kv_lora_rank")
        if self._config.get("q_lora_rank") is None:
            yield from self._projection("q_proj", query, self._hidden)
        else:
            rank = self._size("q_lora_rank")
            yield from self._projection("q_a_proj", rank, self._hidden)
            yield from self._norm("q_a_layernorm", rank)
            yield from self._projection("q_b_proj", query, rank)
        yield from self._projection("kv_a_proj_with_mqa", key_value + rotary, self._hidden)
        yield from self._norm("kv_a_layernorm", key_value)
        yield Parameter("kv_b_proj.weight", (heads * (plain + value), key_value), Kind.ABSORBED)
        yield from self._projection("o_proj", self._hidden, heads * value)
        if self._config.get("index_n_heads") is not None:  # the sparse attention of DeepSeek V3.2
            count, head = self._size("index_n_heads"), self._size("index_head_dim")
            yield Parameter("indexer.wq_b.weight", (count * head, self._size("q_lora_rank")), Kind.ABSORBED)
            yield Parameter("indexer.wk.weight", (head, self._hidden), Kind.ABSORBED)
            yield from self._norm("indexer.k_norm", head)
            yield Parameter("indexer.k_norm.bias", (head,), Kind.BIAS)
            yield Parameter("indexer.weights_proj.weight", (count, self._hidden), Kind.HEAD)
        if self._family.frequencies:  # of a head's size that this attention does not have, as published
            yield Parameter("rotary_emb.inv_freq", (self._hidden // heads // 2,), Kind.FREQUENCIES)

    def _mixture(self) -> Iterator[Parameter]:
        if self._experts is None:
            raise SourceError(f"{CONFIG}: {self._model.reason}: the experts' names are not known here")
        experts, inner = self._size(self._experts), self._size("moe_intermediate_size")
        yield Parameter("gate.weight", (experts, self._hidden), Kind.HEAD)
        method = self._config.get("topk_method")
        if method == "noaux_tc" or (method is None and self._family.router_bias):
            yield Parameter("gate.e_score_correction_bias", (experts,), Kind.ROUTER_BIAS)
        for expert in range(experts):
            yield from _within(f"experts.{expert}", self._mlp(inner))
        if self._config.get("n_shared_experts"):
            yield from _within("shared_experts", self._mlp(inner * self._size("n_shared_experts")))
        if self._config.get("shared_expert_intermediate_size"):  # Qwen2's, which is weighted by a gate of its own
            yield from _within("shared_expert", self._mlp(self._size("shared_expert_intermediate_size")))
            yield Parameter("shared_expert_gate.weight", (1, self._hidden), Kind.HEAD)

    def _mlp(self, inner: int, *, biased: bool = False) -> Iterator[Parameter]:
        for module in DENSE_FFN.laid_out("separate"):
            yield from _linear(module.name, DENSE_FFN.weight_shape(module, self._model, inner), biased=biased)

    def _projection(self, name: str, out_features: int, in_features: int) -> Iterator[Parameter]:
        biased = self._family.always_biased or self._config.get("attention_bias")
        yield from _linear(name, (out_features, in_features), biased=bool(biased) and name in self._family.biased)

    def _norm(self, module: str, width: int | None = None) -> Iterator[Parameter]:
        yield Parameter(f"{module}.weight", (width or self._hidden,), Kind.NORM)

    def _size(self, key: str, default: int | None = None) -> int:
        return number(self._config, key, default, least=1)


def _within(module: str, parameters: Iterable[Parameter]) -> Iterator[Parameter]:
    for parameter in parameters:
        yield replace(parameter, name=f"{module}.{parameter.name}")


def _linear(module: str, shape: tuple[int, int], *, biased: bool) -> Iterator[Parameter]:
    yield Parameter(f"{module}.weight", shape, Kind.LINEAR)
    if biased:
        yield Parameter(f"{module}.bias", shape[:1], Kind.BIAS)
