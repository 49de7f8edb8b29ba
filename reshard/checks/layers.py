"""The part itself: layers, shapes, schemes."""

from collections.abc import Callable, Mapping
from typing import Any

from reshard.checkpoint.description import Checkpoint, Layer, Linear
from reshard.checks.finding import Finding
from reshard.checks.report import not_checked
from reshard.errors import LayersError, ReshardError, SchemeError, ShapesError
from reshard.model.config import read_model_config
from reshard.model.naming import CONFIG, counted_layers, layers_named, numbers
from reshard.model.parts import DENSE_FFN
from reshard.strict_json import parse_object

_CHECKS = ("layers", "shapes", "scheme")
_BY_ERROR: dict[type[ReshardError], str] = {LayersError: "layers", ShapesError: "shapes", SchemeError: "scheme"}


def check_layers(describe: Callable[[], Checkpoint]) -> tuple[list[Finding], Checkpoint | None]:
    """Findings, and the description if it can be had.

    The first thing that is wrong ends a description, so the other checks of this part are then not made. What cannot
    be read at all is raised as `describe` raises it.
    """
    try:
        checkpoint = describe()
    except tuple(_BY_ERROR) as error:
        failed = _BY_ERROR[type(error)]
        others = tuple(check for check in _CHECKS if check != failed)
        return [Finding(failed, "", str(error)), *not_checked(others, f"see {failed}")], None
    found = [_layers(checkpoint), Finding("shapes", "", _shapes(checkpoint), "ok"), _scheme(checkpoint)]
    return found, checkpoint


def config_of(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """Its config.json, if it has one."""
    raw = checkpoint.side_files.get(CONFIG)
    return parse_object(raw, CONFIG) if raw is not None else None


def _layers(checkpoint: Checkpoint) -> Finding:
    indexes = [layer.index for layer in checkpoint.layers if layer.index is not None]
    what = counted_layers(checkpoint.part, len(checkpoint.layers)) + (f" ({numbers(indexes)})" if indexes else "")
    if checkpoint.warnings:
        return Finding("layers", "", f"{what}: {'; '.join(checkpoint.warnings)}", "warning")
    config = config_of(checkpoint)
    if config is None:
        return Finding("layers", "", what, "ok")
    model = read_model_config(config)
    if checkpoint.part is not DENSE_FFN:
        return Finding("layers", "", what, "ok")
    return Finding("layers", "", f"{what}, as {CONFIG} says ({model.reason}){untouched(config)}", "ok")


def untouched(config: Mapping[str, Any]) -> str:
    """What of the model stays whole, to be added to a line on its dense layers."""
    model = read_model_config(config)
    parts = []
    sparse = model.num_hidden_layers - len(model.dense_layers or ())
    if model.dense_layers is not None and sparse:
        parts.append(_counted(sparse, "MoE layer"))
    if model.mtp_layers:
        parts.append(_counted(model.mtp_layers, "MTP layer"))
    return f"; {' and '.join(parts)} left alone" if parts else ""


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _shapes(checkpoint: Checkpoint) -> str:
    part = checkpoint.part
    return ", ".join(
        f"{module} {[getattr(checkpoint.model, size) for size in (module.roles[0].out, module.roles[0].in_)]}"
        for module in part.modules
    )


def _scheme(checkpoint: Checkpoint) -> Finding:
    """The schemes by layer, one line for all that are alike."""
    by_text: dict[str, list[int | None]] = {}
    for layer in checkpoint.layers:
        by_text.setdefault(_spelt(layer), []).append(layer.index)
    if len(by_text) == 1:
        return Finding("scheme", "", next(iter(by_text)), "ok")
    texts = [f"{layers_named([i for i in found if i is not None])}: {text}" for text, found in by_text.items()]
    return Finding("scheme", "", "; ".join(texts), "ok")


def _spelt(layer: Layer) -> str:
    kinds = {str(module): _kind(linears[0]) for module, linears in layer.modules("fused")}
    if len(set(kinds.values())) == 1:
        return next(iter(kinds.values()))
    return ", ".join(f"{module} {kind}" for module, kind in kinds.items())


def _kind(linear: Linear) -> str:
    suffixes = ", ".join(f"{suffix} {tensor.dtype}" for suffix, tensor in sorted(linear.tensors.items(), key=_weight))
    blocks = f", blocks of {linear.block[0]} x {linear.block[1]}" if linear.block else ""
    return f"{linear.variant.scheme} ({suffixes}{blocks})"


def _weight(item: tuple[str, object]) -> tuple[bool, str]:
    return item[0] != "weight", item[0]
