"""Files that are not there, and that no index accounts for: whether what is there is all of the part."""

from collections.abc import Iterable, Mapping, Sequence

from reshard.checkpoint.describe import describe_layers
from reshard.checkpoint.description import Layer, Tensor
from reshard.errors import ReshardError, SourceError
from reshard.manifest import ModelDims
from reshard.model.config import ModelConfig, read_model_config
from reshard.model.naming import CONFIG, layers_named, numbers, parse_tensor
from reshard.model.parts import Part, Place
from reshard.quantization import Accounts
from reshard.schemes.table import VARIANTS, Variant
from reshard.source.base import MISSING, Source
from reshard.source.choice import named
from reshard.source.recognise import unfinished
from reshard.source.weights import INDEX_ENDING


def describe_what_is_there(
    source: Source,
    missing: Sequence[str],
    tensors: Mapping[str, Tensor],
    other_names: Iterable[str],
    accounts: Accounts,
    part: Part,
) -> tuple[ModelDims, tuple[Layer, ...], tuple[str, ...]]:
    """describe_layers, with a warning where files are missing that hold nothing of the part.

    missing: files of the weights that are not there. Raises SourceError where one of them may hold a tensor of the
    part: where config.json, of a family that is known, does not name the layers that are there.
    """
    if not missing:
        return describe_layers(tensors, other_names, accounts, part)
    lost, way = _lost(source, missing)
    model = read_model_config(accounts.config) if accounts.config is not None else None
    if doubt := _doubt(part, tensors, model):
        raise SourceError(f"{lost}: {doubt}; {way}")
    try:
        described = describe_layers(tensors, other_names, accounts, part)
    except ReshardError as error:
        raise type(error)(f"{lost}; {error}") from error
    every = range(model.num_hidden_layers) if model is not None and part.place is Place.LAYERS else ()
    if lacking := set(every) - {layer.index for layer in described[1]}:
        raise SourceError(f"{lost}: {part.path} of {layers_named(lacking)} may be there; {way}")
    told = accounts.description is not None
    for layer in described[1]:
        for role, linear in layer.linears.items():
            if more := _may_have(linear.variant, told):
                raise SourceError(f"{lost}: {layer.name(role)} may have {', '.join(sorted(more))} there; {way}")
    return *described[:2], (*described[2], f"{lost}; {_all_of(part)} is in the others")


def _lost(source: Source, missing: Sequence[str]) -> tuple[str, str]:
    """What is not there, and the way out."""
    first = next((file for file in missing if source.absent(file) != MISSING), missing[0])
    absent, them = source.absent(first), "it" if len(missing) == 1 else "them"
    gone = f"{first} is {absent}"
    if len(missing) > 1:
        gone = f"{named(missing)} are not there{'' if absent == MISSING else f' ({gone})'}"
    get = f"download {them}" if absent == MISSING else f"put {them} there"
    way = unfinished(first, source.files()) or f"{get}, or the index of these files (*{INDEX_ENDING})"
    return f"{gone}, and no index says what is in {them}", way


def _all_of(part: Part) -> str:
    if not part.place.in_layers:
        return f"the {part.name}"
    return f"every {part.unit} that {CONFIG} names"


def _doubt(part: Part, tensors: Mapping[str, Tensor], model: ModelConfig | None) -> str | None:
    """Why the files that are there may not hold all of the part."""
    if not part.place.in_layers:
        return None
    if part.place is Place.LAYERS:
        return None if model is not None else f"no {CONFIG} says how many layers there are"
    if model is None:
        return f"no {CONFIG} says which layers are dense"
    if model.dense_layers is None or not model.is_stated or model.doubts:
        return next(iter(model.doubts), f"{CONFIG} does not say which layers are dense ({model.reason})")
    roles: dict[str, dict[int, set[str]]] = {}
    whole = ({role.name for role in part.roles}, {module.name for module in part.modules})
    for name in tensors:
        parsed = parse_tensor(name, part)
        if parsed is not None and parsed.layer is not None and parsed.layer < model.num_hidden_layers:
            roles.setdefault(parsed.prefix, {}).setdefault(parsed.layer, set()).add(parsed.role)
    there = [{layer for layer, held in layers.items() if held in whole} for layers in roles.values()]
    if model.dense_layers in there:
        return None
    most = max(there, key=len, default=set())
    return (
        f"{CONFIG} ({model.reason}) makes layers {numbers(model.dense_layers)} dense, and of these the other files "
        f"hold {numbers(most & model.dense_layers)}"
    )


def _may_have(variant: Variant, told: bool) -> frozenset[str]:
    """What tools write for some linears of this kind and not for all: a linear without it is not known to be whole.

    told: whether a description says what kind it is; else it may be of any with such a weight (ModelSlim's weights are
    served with a config.json of compressed-tensors, too).
    """
    weights = set(variant.tensors[0].dtypes)
    alike = (v for v in VARIANTS if (v.kind == variant.kind if told else weights & {*v.tensors[0].dtypes}))
    return frozenset().union(
        *(other.suffixes - variant.suffixes for other in alike if other.suffixes > variant.suffixes)
    )
