"""Whatever stands in the JSON files beside the weights, a cut is made or refused in one line; nothing else happens."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard.checkpoint.config_only import config_checkpoint, read_config
from reshard.errors import ReshardError
from reshard.plan.pipeline import Cut, prepare
from reshard.source.open import open_source
from reshard.writer.split import SplitOptions, write_shards
from tests.support import field
from tests.support.builders import RECIPES, Spec, build
from tests.support.manifests import MANIFEST, edit_manifest, sealed

ODD: list[Any] = [None, True, False, 0, 1, -1, 2, 129, 1_000_000, 0.5, -0.0, "", "x", "FLOAT", "fp8", "../x", "\ud800"]
ODD += [10**250, -(2**63), 1e308, "9" * 300, "x" * 10_000, "re:(a+)+$", "(.*)*!", [[[]]], {"a": [[]]}, [None], [{}]]
ODD += ["a\nb", "re:(", "re:.*", [], {}, [1], ["dense"], [[]], {"a": 1}, [1, 1], ["re:.*"], {"group_0": {}}]
KEYS = ["", "x", "a\nb", "__metadata__", "weight_block_size", "mlp_layer_types", "moe_layer_freq", "num_experts"]
FIELD = ["a06-llama4-maverick", "c03-modelopt-fp8-tensor", "c20-ct-transform-r4", "c28-auto-round", "d01-ernie45-moe"]
USED = ["bf16", "modelslim_static", "mindie", "fp8_block", "int8_block", "ct_static_asymmetric", "ct_fp8_block"]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to everything in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one or two things in it replaced, removed or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from([place for place in places(value) if place] or [(None,)]))
        if last is None:
            return draw(st.sampled_from(ODD))
        holder = value
        for key in path:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
        if action == "remove":
            del holder[last]
        elif action == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(KEYS))] = holder.pop(last)
        else:
            holder[last] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return value


@pytest.fixture(scope="module", params=USED)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint."""
    folder: Path = tmp_path_factory.mktemp("json") / "model"
    build(folder, Spec(request.param, hidden=128, intermediate=256, dense=1))
    return folder


@pytest.fixture(scope="module")
def shard_set(checkpoint: Path) -> Path:
    """The same, cut."""
    with open_source(str(checkpoint)) as source:
        write_shards(prepare(source, Cut(2)), checkpoint.parent / "set", SplitOptions())
    return checkpoint.parent / "set"


def read(folder: Path) -> None:
    with open_source(str(folder)) as source:
        prepare(source, Cut(2))


def read_alone(folder: Path) -> None:
    """config.json without the weights."""
    config_checkpoint(read_config(folder / "config.json"), "config.json")


def check(folder: Path, data: st.DataObject, reader: Callable[[Path], None] = read) -> None:
    """Change one JSON file of a folder, cut, and put the file back."""
    path = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.glob("*.json"))))
    raw = path.read_bytes()
    value = data.draw(changed(json.loads(raw)))
    if path.name == MANIFEST and isinstance(value, dict):
        path.write_bytes(sealed(value))
    else:
        path.write_text(json.dumps(value))
    message = ""
    try:
        reader(folder)
    except ReshardError as error:
        message = str(error)
    finally:
        path.write_bytes(raw)
    assert message.isprintable()


quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(st.data())
def test_checkpoints(checkpoint: Path, data: st.DataObject) -> None:
    check(checkpoint, data)


@pytest.fixture(scope="module", params=FIELD)
def field_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as it was found."""
    folder: Path = tmp_path_factory.mktemp("field")
    return field.build(request.param, folder / "model")


@pytest.mark.parametrize("reader", [read, read_alone])
@quick
@given(st.data())
def test_checkpoints_as_they_are_found(field_case: Path, reader: Callable[[Path], None], data: st.DataObject) -> None:
    check(field_case, data, reader)


@quick
@given(st.data())
def test_shard_sets(shard_set: Path, data: st.DataObject) -> None:
    check(shard_set, data)


def test_the_unchanged_checkpoint_is_cut(shard_set: Path) -> None:
    """Without it the tests above could pass on refusals alone."""
    with open_source(str(shard_set)) as source:
        assert len(prepare(source, Cut(1)).plan.shards) == 1
    assert set(USED) < set(RECIPES)


def test_a_scheme_that_no_table_has(shard_set: Path) -> None:
    path = shard_set / "manifest.json"
    raw = path.read_text()

    def change(manifest: dict[str, Any]) -> None:
        for layer in manifest["layers"]:
            for linear in layer["linears"].values():
                linear["scheme"] = "int3"

    edit_manifest(shard_set, change)
    try:
        with pytest.raises(ReshardError, match=r"manifest\.json: .*unknown scheme int3; supported are bf16, "):
            read(shard_set)
    finally:
        path.write_text(raw)
