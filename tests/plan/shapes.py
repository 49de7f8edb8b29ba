"""Checkpoints of any size, without bytes, and the share of intermediate_size that a rank must get."""

from reshard.checkpoint.describe import describe_layers
from reshard.checkpoint.description import Checkpoint, Identity, Tensor
from reshard.quantization import Accounts
from tests.support.builders import RECIPES, Spec, config_of, description_of
from tests.support.cut_by_hand import BLOCK, GROUP


def shape_of(rule: str, out: int, in_: int) -> tuple[int, ...]:
    blocks, groups = (-(-out // BLOCK), -(-in_ // BLOCK)), (out, -(-in_ // GROUP))
    shapes = {"out,in": (out, in_), "out,1": (out, 1), "out": (out,), "1": (1,), "blocks": blocks, "groups": groups}
    return shapes[rule]


def recipe_of(spec: Spec, role: str) -> str:
    return (spec.down_recipe or spec.recipe) if role == "down_proj" else spec.recipe


def shapes_of(spec: Spec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every DenseFFN tensor."""
    found = {}
    for layer in range(spec.dense):
        for role in ("gate_proj", "up_proj", "down_proj"):
            sizes = (spec.intermediate, spec.hidden)
            out, in_ = sizes[::-1] if role == "down_proj" else sizes
            for suffix, (dtype, rule) in RECIPES[recipe_of(spec, role)].tensors.items():
                found[f"model.layers.{layer}.mlp.{role}.{suffix}"] = (dtype, shape_of(rule, out, in_))
    return found


def checkpoint_of(spec: Spec, order: list[str] | None = None) -> Checkpoint:
    """The checkpoint that such files would make, its tensors found in the given order."""
    shapes = shapes_of(spec)
    description = description_of(spec, {name: (*shape, b"") for name, shape in shapes.items()})
    tensors = {}
    for name in order or shapes:
        tensors[name] = Tensor(name, *shapes[name], ()).within("model.safetensors", 0)
    named = ("quant_model_description.json", description) if description else None
    model, layers, _ = describe_layers(tensors, (), Accounts(config_of(spec), named))
    return Checkpoint(Identity("folder", "made", None, ()), model, layers, {}, len(tensors), 0)


def grid_of(spec: Spec) -> int:
    gate, down = (
        {rule for _, rule in RECIPES[recipe_of(spec, r)].tensors.values()} for r in ("gate_proj", "down_proj")
    )
    if "blocks" in gate | down:
        return BLOCK
    return GROUP if "groups" in down else 1  # gate's groups lie along hidden_size


def share_of(spec: Spec, tp: int, layout: str, pad: bool) -> int | None:
    """L, the positions of I that a rank holds; None where the cut must be refused."""
    size, grid = spec.intermediate, grid_of(spec)
    if not 1 <= tp <= size:
        return None
    if size % (tp * grid) == 0 or (tp == 1 and layout == "separate"):
        return size // tp
    return -(-size // (tp * grid)) * grid if pad else None
