"""Every parameter of a model by its config.json: its name in the published checkpoints, its shape, what it is.

H hidden_size, I intermediate_size, E experts. Order: the model's own, with the prediction block last, as published.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from reshard.errors import SourceError
from reshard.model.config import ModelConfig, experts_key, known_dense_layers, read_model_config
from reshard.model.naming import CONFIG, DOWN, GATE, PREFIX, UP, layer_name
from reshard.synth.config import Config, size


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


def parameters(config: Config, prefix: str = PREFIX) -> Iterator[Parameter]:
    """Every parameter of a language model, in its order. Raises SourceError where its config does not give them.

    prefix: what precedes the layers' names.
    """
    return _Model(config, prefix).parameters()


class _Model:
    """A config.json, read for names and shapes."""

    def __init__(self, config: Config, prefix: str) -> None:
        self._config = config
        self._prefix = prefix
        self._model: ModelConfig = read_model_config(config)
        family = _FAMILIES.get(self._model.model_type)
        if family is None:
            raise SourceError(
                f"{CONFIG}: model_type {self._model.model_type!r}: its tensors' names are not known here; known are "
                f"{', '.join(sorted(_FAMILIES))}"
            )
        self._family = family
        self._dense = known_dense_layers(self._model)
        self._hidden = self._model.hidden_size
        key = experts_key(config, named=True)
        self._experts = size(config, key) if key else 0

    def parameters(self) -> Iterator[Parameter]:
        last = self._model.num_hidden_layers
        table = (size(self._config, "vocab_size"), self._hidden)
        yield Parameter(f"{self._prefix}embed_tokens.weight", table, Kind.EMBEDDING)
        for layer in range(last):
            yield from self._block(layer_name(self._prefix, layer), dense=layer in self._dense)
        yield self._norm(f"{self._prefix}norm")
        if not self._config.get("tie_word_embeddings"):
            yield Parameter(f"{self._head()}lm_head.weight", table, Kind.HEAD)
        for layer in range(last, last + self._model.mtp_layers):
            prefix = layer_name(self._prefix, layer)
            yield Parameter(f"{prefix}.embed_tokens.weight", table, Kind.EMBEDDING)
            yield self._norm(f"{prefix}.enorm")
            yield self._norm(f"{prefix}.hnorm")
            yield Parameter(f"{prefix}.eh_proj.weight", (self._hidden, 2 * self._hidden), Kind.HEAD)
            yield from self._block(prefix, dense=not self._experts)
            yield self._norm(f"{prefix}.shared_head.norm")
            yield Parameter(f"{prefix}.shared_head.head.weight", table, Kind.HEAD)

    def _head(self) -> str:
        """What precedes the output head's name: it stands beside the `model` whose layers these are, or at the top."""
        *above, last, _ = ["", *self._prefix.split(".")]
        return ".".join((*above[1:], "")) if last == "model" else ""

    def _block(self, prefix: str, *, dense: bool) -> Iterator[Parameter]:
        attention = self._grouped if self._config.get("kv_lora_rank") is None else self._latent
        yield from attention(f"{prefix}.self_attn")
        if dense:
            yield from self._mlp(f"{prefix}.mlp", self._model.intermediate_size, bool(self._config.get("mlp_bias")))
        else:
            yield from self._mixture(f"{prefix}.mlp")
        yield self._norm(f"{prefix}.input_layernorm")
        yield self._norm(f"{prefix}.post_attention_layernorm")

    def _grouped(self, prefix: str) -> Iterator[Parameter]:
        """Heads that share keys and values, as in Llama, Qwen and GLM-4.5."""
        heads = size(self._config, "num_attention_heads")
        shared = size(self._config, "num_key_value_heads", heads)
        head = size(self._config, "head_dim", self._hidden // heads)
        yield from self._projection(prefix, "q_proj", heads * head, self._hidden)
        yield from self._projection(prefix, "k_proj", shared * head, self._hidden)
        yield from self._projection(prefix, "v_proj", shared * head, self._hidden)
        yield from self._projection(prefix, "o_proj", self._hidden, heads * head)
        if self._family.qk_norm or self._config.get("use_qk_norm"):
            yield self._norm(f"{prefix}.q_norm", head)
            yield self._norm(f"{prefix}.k_norm", head)

    def _latent(self, prefix: str) -> Iterator[Parameter]:
        """Multi-head latent attention, as in DeepSeek V2, V3, R1 and Kimi K2."""
        heads, value = size(self._config, "num_attention_heads"), size(self._config, "v_head_dim")
        plain, rotary = size(self._config, "qk_nope_head_dim"), size(self._config, "qk_rope_head_dim")
        query, key_value = heads * (plain + rotary), size(self._config, "kv_lora_rank")
        if self._config.get("q_lora_rank") is None:
            yield from self._projection(prefix, "q_proj", query, self._hidden)
        else:
            rank = size(self._config, "q_lora_rank")
            yield from self._projection(prefix, "q_a_proj", rank, self._hidden)
            yield self._norm(f"{prefix}.q_a_layernorm", rank)
            yield from self._projection(prefix, "q_b_proj", query, rank)
        yield from self._projection(prefix, "kv_a_proj_with_mqa", key_value + rotary, self._hidden)
        yield self._norm(f"{prefix}.kv_a_layernorm", key_value)
        yield Parameter(f"{prefix}.kv_b_proj.weight", (heads * (plain + value), key_value), Kind.ABSORBED)
        yield from self._projection(prefix, "o_proj", self._hidden, heads * value)
        if self._config.get("index_n_heads") is not None:
            yield from self._indexer(f"{prefix}.indexer")
        if self._family.frequencies:  # of a head's size that this attention does not have, as published
            yield Parameter(f"{prefix}.rotary_emb.inv_freq", (self._hidden // heads // 2,), Kind.FREQUENCIES)

    def _indexer(self, prefix: str) -> Iterator[Parameter]:
        """The sparse attention of DeepSeek V3.2."""
        heads, head = size(self._config, "index_n_heads"), size(self._config, "index_head_dim")
        yield Parameter(f"{prefix}.wq_b.weight", (heads * head, size(self._config, "q_lora_rank")), Kind.ABSORBED)
        yield Parameter(f"{prefix}.wk.weight", (head, self._hidden), Kind.ABSORBED)
        yield self._norm(f"{prefix}.k_norm", head)
        yield Parameter(f"{prefix}.k_norm.bias", (head,), Kind.BIAS)
        yield Parameter(f"{prefix}.weights_proj.weight", (heads, self._hidden), Kind.HEAD)

    def _mixture(self, prefix: str) -> Iterator[Parameter]:
        if not self._experts:
            raise SourceError(f"{CONFIG}: {self._model.reason}: the experts' names are not known here")
        inner = size(self._config, "moe_intermediate_size")
        yield Parameter(f"{prefix}.gate.weight", (self._experts, self._hidden), Kind.HEAD)
        method = self._config.get("topk_method")
        if method == "noaux_tc" or (method is None and self._family.router_bias):
            yield Parameter(f"{prefix}.gate.e_score_correction_bias", (self._experts,), Kind.ROUTER_BIAS)
        for expert in range(self._experts):
            yield from self._mlp(f"{prefix}.experts.{expert}", inner)
        if self._config.get("n_shared_experts"):
            yield from self._mlp(f"{prefix}.shared_experts", inner * size(self._config, "n_shared_experts"))
        if self._config.get("shared_expert_intermediate_size"):  # Qwen2's, which is weighted by a gate of its own
            yield from self._mlp(f"{prefix}.shared_expert", size(self._config, "shared_expert_intermediate_size"))
            yield Parameter(f"{prefix}.shared_expert_gate.weight", (1, self._hidden), Kind.HEAD)

    def _mlp(self, prefix: str, inner: int, biased: bool = False) -> Iterator[Parameter]:
        shapes = {GATE: (inner, self._hidden), UP: (inner, self._hidden), DOWN: (self._hidden, inner)}
        for role, shape in shapes.items():
            yield Parameter(f"{prefix}.{role}.weight", shape, Kind.LINEAR)
            if biased:
                yield Parameter(f"{prefix}.{role}.bias", shape[:1], Kind.BIAS)

    def _projection(self, prefix: str, name: str, out_features: int, in_features: int) -> Iterator[Parameter]:
        yield Parameter(f"{prefix}.{name}.weight", (out_features, in_features), Kind.LINEAR)
        if name in self._family.biased and (self._family.always_biased or self._config.get("attention_bias")):
            yield Parameter(f"{prefix}.{name}.bias", (out_features,), Kind.BIAS)

    def _norm(self, module: str, width: int | None = None) -> Parameter:
        return Parameter(f"{module}.weight", (width or self._hidden,), Kind.NORM)
