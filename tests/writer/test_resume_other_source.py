"""A source whose bytes changed where no sample looks: the set is of one source, whoever cut which rank of it."""

from pathlib import Path

import pytest

from reshard.errors import OutputError
from reshard.plan.pipeline import Cut, prepare
from reshard.source.folder import FolderSource
from reshard.source.open import open_source
from reshard.writer.split import SplitOptions, SplitResult, write_shards
from tests.support.builders import Spec, build, read_safetensors, write_safetensors
from tests.support.hub_server import COMMIT, Hub, serving
from tests.support.hub_source import opened
from tests.support.running import reshard, split
from tests.support.sets import Files, ranks_of, shard, snapshot

DOWN = "model.layers.1.mlp.down_proj.weight"
COLUMNS = 512  # of down's, two bytes each; a rank of four has 128


@pytest.fixture
def source(tmp_path: Path) -> Path:
    build(tmp_path / "source", Spec(files=1))
    return tmp_path / "source"


@pytest.fixture
def other(tmp_path: Path, source: Path) -> Path:
    """Repaired in place: the same names, sizes and headers, and one other byte, of rank 0 alone."""
    build(tmp_path / "other" / "source", Spec(files=1))
    (path,) = (tmp_path / "other" / "source").glob("*.safetensors")
    tensors = read_safetensors(path)
    dtype, shape, data = tensors[DOWN]
    at = 100 * COLUMNS * 2 + 20  # row 100, column 10: not among the first, the middle or the last two rows
    tensors[DOWN] = (dtype, shape, data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
    write_safetensors(path, tensors, {"format": "pt"})
    with FolderSource(source) as one, FolderSource(path.parent) as two:
        assert prepare(one, Cut(4)).sample == prepare(two, Cut(4)).sample
    return path.parent


def options(**values: object) -> SplitOptions:
    return SplitOptions(workers=2, **values)  # type: ignore[arg-type]


@pytest.fixture
def wanted(tmp_path: Path, other: Path) -> Files:
    split(other, tmp_path / "wanted", Cut(4))
    return snapshot(tmp_path / "wanted")


def test_a_shard_that_the_source_no_longer_gives_is_cut_again(
    tmp_path: Path, source: Path, other: Path, wanted: Files
) -> None:
    out = tmp_path / "out"
    split(source, out, Cut(4), options(ranks=(0, 1)))
    result = split(other, out, Cut(4), options(resume=True))
    assert (ranks_of(result.kept), ranks_of(result.written)) == ([1], [0, 2, 3])
    assert snapshot(out) == wanted
    assert reshard("verify", out, "--source", other, "--quiet").code == 0


def test_another_run_s_shard_does_not_complete_the_set(
    tmp_path: Path, source: Path, other: Path, wanted: Files
) -> None:
    """Without --resume: ranks by ranks, the source repaired between two of them."""
    out = tmp_path / "out"
    split(source, out, Cut(4), options(ranks=(0, 1)))
    result = split(other, out, Cut(4), options(ranks=(2, 3)))
    assert (result.complete, result.missing) == (False, (0,))
    assert "manifest.json" not in snapshot(out)
    assert split(other, out, Cut(4), options(resume=True, ranks=(0,))).complete
    assert snapshot(out) == wanted


@pytest.mark.parametrize("ranks", [None, (0,), (3,)])
def test_a_finished_set_is_of_another_source(
    ranks: tuple[int, ...] | None, tmp_path: Path, source: Path, other: Path
) -> None:
    """Whichever ranks are asked for: those of the old source must not stand beside the new one's."""
    out = tmp_path / "out"
    split(source, out, Cut(4))
    before = snapshot(out)
    with pytest.raises(OutputError) as caught:
        split(other, out, Cut(4), options(resume=True, ranks=ranks))
    assert f"holds a finished set of another source: {DOWN} in {shard(0)} is not what this source gives" in str(
        caught.value
    )
    assert "choose another folder, or --overwrite it" in str(caught.value)
    assert snapshot(out) == before


def test_a_finished_set_is_repaired_with_its_own_shards_alone(tmp_path: Path, source: Path, other: Path) -> None:
    """Its manifest stands meanwhile, and a loader relies on it."""
    out = tmp_path / "out"
    split(source, out, Cut(4))
    before = snapshot(out)
    (out / shard(0)).write_bytes(b"cut short")
    with pytest.raises(OutputError, match=rf"finished set of another source: {shard(0)} is not what this source gives"):
        split(other, out, Cut(4), options(resume=True, ranks=(0,)))
    assert (out / shard(0)).read_bytes() == b"cut short"
    assert split(source, out, Cut(4), options(resume=True)).complete
    assert snapshot(out) == before


def test_the_same_bytes_are_kept_and_counted(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    split(source, out, Cut(4), options(ranks=(0, 1, 2)))
    counted: list[int] = []
    with FolderSource(source) as opened:
        prepared = prepare(opened, Cut(4))
        result = write_shards(prepared, out, options(resume=True), counted.append)
    assert ranks_of(result.kept) == [0, 1, 2]
    planned = prepared.plan.shards
    headers = len(planned[3].header)
    assert sum(counted) == sum(shard.size for shard in planned) - headers


def test_a_record_of_the_right_digests_and_another_file_is_none(tmp_path: Path, source: Path) -> None:
    """What the source gives is what is recorded, and what stands in the folder is not."""
    out = tmp_path / "out"
    split(source, out, Cut(4), options(ranks=(0, 1)))
    (out / shard(0)).write_bytes((out / shard(1)).read_bytes())
    result = split(source, out, Cut(4), options(resume=True))
    assert (ranks_of(result.kept), ranks_of(result.written)) == ([1], [0, 2, 3])


def test_converted_weights_are_computed_again(tmp_path: Path, source: Path, other: Path) -> None:
    pytest.importorskip("torch")
    cut = Cut(4, weights="w8a8")
    split(other, tmp_path / "wanted", cut)
    split(source, tmp_path / "out", cut, options(ranks=(0, 1, 2)))
    result = split(other, tmp_path / "out", cut, options(resume=True))
    assert 0 in ranks_of(result.written)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "wanted")


def test_a_commit_is_not_fetched_again(tmp_path: Path, source: Path) -> None:
    """The bytes of a commit cannot change: of kept shards only what is looked at first is fetched."""
    with serving(Hub({COMMIT: source})) as hub:

        def run(**values: object) -> tuple[SplitResult, int]:
            before = hub.data_bytes
            with opened(hub) as remote:
                result = write_shards(prepare(remote, Cut(4)), tmp_path / "out", options(**values))
            return result, hub.data_bytes - before

        _, most = run(ranks=(0, 1, 2))
        result, some = run(resume=True)
        assert (ranks_of(result.kept), ranks_of(result.written)) == ([0, 1, 2], [3])
        finished, least = run(resume=True)
        assert ranks_of(finished.kept) == [0, 1, 2, 3]
        assert least < 200_000 < some <= most


def test_an_address_without_a_commit_is_fetched_again(tmp_path: Path, source: Path, other: Path, wanted: Files) -> None:
    """Nothing pins a folder on a server: its bytes are compared."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for folder in (source, other):
        for path in folder.iterdir():
            memory.pipe_file(f"/resumed/source/{path.name}", path.read_bytes())
        with open_source("memory://resumed/source") as remote:
            result = write_shards(
                prepare(remote, Cut(4)),
                tmp_path / "out",
                options(ranks=(0, 1)) if folder is source else options(resume=True),
            )
    memory.rm("/resumed", recursive=True)
    assert (ranks_of(result.kept), ranks_of(result.written)) == ([1], [0, 2, 3])
    for file, data in wanted.items():
        if file.endswith(".safetensors"):
            assert (tmp_path / "out" / file).read_bytes() == data
