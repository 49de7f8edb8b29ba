"""What a shard set says that it was cut from, against a source at hand: no tensor data, no digest of any."""

from collections.abc import Iterator

from reshard.checkpoint.description import Checkpoint
from reshard.checks.finding import Finding
from reshard.fit import fit_source_file
from reshard.manifest import Manifest
from reshard.model.naming import MANIFEST
from reshard.schemes.table import summary


def compare_identity(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[Finding]:
    """The files that the set was cut from against those that the source has. A folder may be called otherwise.

    Warnings: the same weights may lie in other files, which only their bytes tell.
    """
    cut = {file.name: file for file in manifest.source.files}
    there = {file.name: file for file in checkpoint.identity.files}
    for name in sorted(cut.keys() | there.keys()):
        if name not in there:
            lines = [f"{MANIFEST} says that the set was cut from it; the source has no such weights"]
        elif name not in cut:
            lines = [f"holds {manifest.what.name} weights of the source; {MANIFEST} does not name it"]
        else:
            lines = [misfit.message for misfit in fit_source_file(there[name], cut[name])]
        yield from (Finding("identity", name, line, "warning") for line in lines)


def compare_model(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Sizes, layers, scheme."""
    theirs = checkpoint.model.model_dump()
    for key, recorded in manifest.model.model_dump().items():
        if recorded != (real := theirs[key]):
            yield Finding("model", MANIFEST, f"{key} is {recorded!r}, the source's is {real!r}")
    recorded_layers = [layer.index for layer in manifest.layers]
    layers = [layer.index for layer in checkpoint.layers]
    if recorded_layers != layers:
        yield Finding("model", MANIFEST, f"its layers are {recorded_layers}, the source's {layers}")
    cut = {layer.index: layer.activation for layer in manifest.layers}
    for layer in checkpoint.layers:
        if layer.index in cut and cut[layer.index] != layer.activation:
            yield Finding(
                "model",
                layer.module,
                f"{MANIFEST} says that its activation is {cut[layer.index]}, the source makes it {layer.activation}; "
                "cut it again",
            )
    # Each layer's own is checked against the source, so this one is against those.
    scheme = summary({linear.scheme for layer in manifest.layers for linear in layer.linears.values()})
    if manifest.scheme != scheme:
        yield Finding("model", MANIFEST, f"its scheme is {manifest.scheme}, its layers make it {scheme}")
