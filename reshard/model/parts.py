"""The parts of a model that are split, as data: modules, roles, how each is cut, what engines pad.

Plan, manifest, merge, check and verify's comparison go through a part's modules and roles and name none of them.
Names of sizes (`hidden_size`) are those of the manifest's `model`; all but `attention_size` are config.json's, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from reshard.errors import UsageError


class Parallel(Enum):
    """The dimension of a weight [out, in] that a linear is cut along; schemes say it of each of its tensors."""

    COLUMN = 0
    ROW = 1


@dataclass(frozen=True)
class Role:
    """A linear of a part. out, in_: the names of the sizes of its weight [out, in]."""

    name: str
    out: str
    in_: str
    parallel: Parallel
    without: str = ""
    """What a model is whose layers all lack it, if there are any."""


@dataclass(frozen=True)
class Module:
    """What a shard holds under one name: one linear, or several that are stacked on dim 0, each cut first."""

    name: str
    roles: tuple[Role, ...]

    @property
    def parallel(self) -> Parallel:
        """How its linears are cut, all alike."""
        return self.roles[0].parallel

    def __str__(self) -> str:
        return " and ".join(role.name for role in self.roles)


class Place(Enum):
    """Where a model has a part."""

    DENSE_LAYERS = "every dense layer"
    LAYERS = "every layer"
    MODEL = "once, beside the layers"  # {prefix}embed_tokens, where layers are {prefix}layers.{i}
    HEAD = "once, beside the layers or what holds them"  # lm_head, where layers are model.layers.{i}

    @property
    def in_layers(self) -> bool:
        """Whether layers have it, and not the model once."""
        return self in (Place.DENSE_LAYERS, Place.LAYERS)


@dataclass(frozen=True)
class Part:
    """Linears that are split over one group.

    key: its name on the command line, in manifests and files. place, path: where it stands, and what holds its linears
    below a decoder layer's name. modules: those of the fused layout, which is also how checkpoints stack their linears,
    if they do. size: the size that is shared out, each rank an equal share of it. option: the engine option that gives
    the group's size. padded_to: what engines pad that size to a multiple of, whatever the group. may_pad: whether zeros
    may be added to make the shares equal, as the layer computes the same with them. quantized: whether tools quantize
    it; where they do not, a float weight is what it is, whatever is said of the model's linears.
    """

    key: str
    name: str
    place: Place
    path: str
    modules: tuple[Module, ...]
    size: str
    option: str
    padded_to: int = 1
    may_pad: bool = False
    quantized: bool = True

    @property
    def roles(self) -> tuple[Role, ...]:
        """Its linears."""
        return tuple(role for module in self.modules for role in module.roles)

    @property
    def sizes(self) -> tuple[str, ...]:
        """The names of the sizes that its weights have."""
        return tuple(sorted({size for role in self.roles for size in (role.out, role.in_)}))

    @property
    def unit(self) -> str:
        """What one of it is called."""
        return "dense layer" if self.place is Place.DENSE_LAYERS else self.name

    def laid_out(self, layout: str) -> tuple[Module, ...]:
        """The modules that a shard has."""
        return self.modules if layout == "fused" else tuple(Module(role.name, (role,)) for role in self.roles)

    def stacks(self, layout: str) -> bool:
        """Whether a shard has linears stacked."""
        return any(len(module.roles) > 1 for module in self.laid_out(layout))

    def padded(self, size: int) -> int:
        """What engines make of the size that is shared out before they divide it."""
        return -(-size // self.padded_to) * self.padded_to

    def names(self) -> Iterator[str]:
        """Of every linear, apart and stacked."""
        yield from dict.fromkeys(
            (*(role.name for role in self.roles), *(module.name for module in self.modules)),
        )

    def module(self, name: str) -> Module:
        """The module of that name, of either layout."""
        return next(m for layout in ("fused", "separate") for m in self.laid_out(layout) if m.name == name)

    def fused(self, name: str) -> Module | None:
        """The module of the fused layout that a linear of that name is in, or that has the name itself."""
        return next((m for m in self.modules if name == m.name or any(name == r.name for r in m.roles)), None)

    def stack(self, name: str) -> str | None:
        """The name under which a linear may be stacked with others; None for any other name."""
        module = self.fused(name)
        return module.name if module is not None and module.name != name else None

    def stacked(self, name: str) -> tuple[str, ...]:
        """The linears that are stacked under that name; none for any other name."""
        module = self.fused(name)
        names = tuple(role.name for role in module.roles) if module is not None and module.name == name else ()
        return names if names != (name,) else ()

    def shared_size(self, sizes: object) -> int:
        """What is shared out. sizes: has the sizes of the model by their names."""
        return int(getattr(sizes, self.size))

    def weight_shape(self, module: Module, sizes: object, shared: int | None = None) -> tuple[int, int]:
        """[out, in] of a module's weight, with `shared` for the size that is shared out: a rank's share, say."""
        role = module.roles[0]
        out, in_ = (
            shared if name == self.size and shared is not None else int(getattr(sizes, name))
            for name in (role.out, role.in_)
        )
        return out * len(module.roles), in_


_H, _I, _V, _A = "hidden_size", "intermediate_size", "vocab_size", "attention_size"

GATE, UP, DOWN, GATE_UP = "gate_proj", "up_proj", "down_proj", "gate_up_proj"

_NO_GATE = "an MLP without a gate (Nemotron-4, Arcee), or with the gate in up_proj"

DENSE_FFN = Part(
    key="denseffn",
    name="DenseFFN",
    place=Place.DENSE_LAYERS,
    path="mlp",
    modules=(
        Module(GATE_UP, (Role(GATE, _I, _H, Parallel.COLUMN, _NO_GATE), Role(UP, _I, _H, Parallel.COLUMN))),
        Module(DOWN, (Role(DOWN, _H, _I, Parallel.ROW),)),
    ),
    size=_I,
    option="denseffn_tensor_parallel_size",
    may_pad=True,
)
"""Of each dense layer: gate and up, stacked and cut along out, then down, cut along in, whose results are added."""

O_PROJ = Part(
    key="o_proj",
    name="o_proj",
    place=Place.LAYERS,
    path="self_attn",
    modules=(Module("o_proj", (Role("o_proj", _H, _A, Parallel.ROW),)),),
    size=_A,
    option="oproj_tensor_parallel_size",
)
"""Of every layer, MoE layers too: attention's last linear, cut along in (all heads' values); the results are added."""

VOCABULARY_MULTIPLE = 64
"""DEFAULT_VOCAB_PADDING_SIZE of vLLM (model_executor/layers/vocab_parallel_embedding.py); vllm-ascend takes it over."""

LM_HEAD = Part(
    key="lm_head",
    name="LM head",
    place=Place.HEAD,
    path="",
    modules=(Module("lm_head", (Role("lm_head", _V, _H, Parallel.COLUMN),)),),
    size=_V,
    option="lmhead_tensor_parallel_size",
    padded_to=VOCABULARY_MULTIPLE,
    quantized=False,
)
"""The logits' matrix, cut by rows of the vocabulary."""

EMBEDDING = Part(
    key="embedding",
    name="embedding",
    place=Place.MODEL,
    path="",
    modules=(Module("embed_tokens", (Role("embed_tokens", _V, _H, Parallel.COLUMN),)),),
    size=_V,
    option="embedding_tensor_parallel_size",
    padded_to=VOCABULARY_MULTIPLE,
    quantized=False,
)
"""The tokens' vectors, cut by rows of the vocabulary; a rank has zeros for others' tokens, and the ranks' are added."""

PARTS = {part.key: part for part in (DENSE_FFN, LM_HEAD, EMBEDDING, O_PROJ)}

SIZES = (_H, *dict.fromkeys(part.size for part in PARTS.values()))
"""Every size that a part's weights have."""


def part_named(key: str) -> Part:
    """Raises UsageError for a name that is no part's."""
    if key not in PARTS:
        raise UsageError(f"--part {key}: unknown part; known are {', '.join(PARTS)}")
    return PARTS[key]
