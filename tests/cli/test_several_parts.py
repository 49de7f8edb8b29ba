"""One part or several on the command line: where the sets go, what is refused, what the documents say."""

import json
import os
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from reshard import api
from reshard.errors import ReshardError, UsageError
from reshard.model.parts import PARTS
from reshard.plan.pipeline import Cut, prepare
from reshard.source import hub as hub_module
from reshard.source.folder import FolderSource
from reshard.writer.split import SplitOptions, write_shards
from tests.support import faults
from tests.support.hub_server import COMMIT, ORIGIN, REPO, Hub, serving
from tests.support.hub_source import opened
from tests.support.part_models import KEYS, Model, build
from tests.support.running import Done, reshard, same_but_for_the_origin, split, split_parts
from tests.support.sets import no_fsync, snapshot  # noqa: F401
from tests.support.teams import processes

SIZES = {"denseffn": 4, "lm_head": 2, "embedding": 1, "o_proj": 4}
ALL = tuple(option for key, size in SIZES.items() for option in ("--part", f"{key}={size}"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several") / "source"
    build(folder, Model("modelslim_v0_static"))
    return folder


@pytest.fixture(scope="module")
def right(source: Path) -> Path:
    """The sets, cut by the library one by one."""
    folder = source.parent / "right"
    for key, size in SIZES.items():
        split(source, folder / key, Cut(size, part=PARTS[key]))
    return folder


@pytest.fixture
def parts(right: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return Path(shutil.copytree(right, tmp_path / "parts"))


def same(out: Path, right: Path, *keys: str, together: tuple[str, ...] = ()) -> bool:
    """Whether the sets of these parts are those of `right`, which were cut alone, but for what they were cut with."""
    return all(same_set(out / key, right / key, together) for key in keys or KEYS)


def same_set(out: Path, right: Path, together: tuple[str, ...]) -> bool:
    if not together:
        return snapshot(out) == snapshot(right)
    ours, theirs = snapshot(out), snapshot(right)
    said, wanted = (json.loads(files.pop("manifest.json")) for files in (ours, theirs))
    assert said.pop("parts") == list(together)
    assert said.pop("blake3") != wanted.pop("blake3")
    return bool((ours, said) == (theirs, wanted))


def refused(done: Done, code: int, says: str) -> None:
    assert done.code == code, done
    line = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(line) == 1, done.err
    assert says in line[0]


# --- split ---


def test_each_goes_into_a_folder_of_its_name(source: Path, right: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = reshard("split", source, out, *ALL, "--quiet", "--format", "json")
    assert done.code == 0, done.err
    assert sorted(path.name for path in out.iterdir()) == sorted(KEYS)
    assert same(out, right, together=KEYS)
    found = {part["part"]: part for part in done.document["parts"]}
    assert list(found) == list(SIZES)
    assert {key: len(part["shards"]) for key, part in found.items()} == SIZES
    assert {key: part["out"] for key, part in found.items()} == {key: f"{out}/{key}" for key in KEYS}
    assert {key: (part["size"], part["padded_size"]) for key, part in found.items()} == {
        "denseffn": ({"intermediate_size": 256}, None),
        "lm_head": ({"vocab_size": 100}, 128),
        "embedding": ({"vocab_size": 100}, 128),
        "o_proj": ({"attention_size": 256}, None),
    }
    assert {key: part["layers"] for key, part in found.items()} == {
        "denseffn": [0], "lm_head": [None], "embedding": [None], "o_proj": [0, 1],
    }  # fmt: skip
    assert all(part["complete"] for part in found.values())


def test_one_is_the_set_itself(source: Path, right: Path, tmp_path: Path) -> None:
    done = reshard("split", source, tmp_path / "out", "--part", "lm_head", "--tp", 2, "--quiet")
    assert done.code == 0, done.err
    assert snapshot(tmp_path / "out") == snapshot(right / "lm_head")
    assert "bf16, the LM head: 25.00 KiB unsplit; each device holds 20.00 KiB and saves 5.00 KiB" in done.out
    assert "padded: vocab_size 100 to 128" in done.out


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    done = reshard("split", source, tmp_path / "out", *ALL, "--dry-run", "--quiet")
    assert done.code == 0, done.err
    assert not (tmp_path / "out").exists()
    assert done.out.count("dry run: nothing was written") == 4
    for what in ("1 dense layer", "the LM head", "the embedding", "2 layers"):
        assert f", {what}: " in done.out


def test_ranks_and_the_rest_later(source: Path, right: Path, tmp_path: Path) -> None:
    command = ("split", source, tmp_path / "out", "--tp", 2, "--part", "lm_head", "--part", "o_proj=4", "--quiet")
    done = reshard(*command, "--ranks", "1", "--format", "json")
    assert done.code == 0, done.err
    assert [part["missing_ranks"] for part in done.document["parts"]] == [[0], [0, 2, 3]]
    done = reshard(*command, "--resume", "--format", "json")
    kept = [[shard["kept"] for shard in part["shards"]] for part in done.document["parts"]]
    assert kept == [[False, True], [False, True, False, False]]
    assert same(tmp_path / "out", right, "lm_head", "o_proj", together=("lm_head", "o_proj"))
    refused(reshard(*command, "--ranks", "0-2"), 2, "--ranks 0-2: 0-2 is not within 0 to 1, the ranks of --tp 2")
    says = "--ranks 0-4: 0-4 is not within 0 to 3, the ranks of --part o_proj=4"
    refused(reshard("split", source, tmp_path / "out", "--part", "o_proj=4", "--ranks", "0-4"), 2, says)


@pytest.mark.parametrize("key", KEYS)
def test_a_finished_set_is_kept_or_replaced(source: Path, right: Path, parts: Path, key: str) -> None:
    other = "lm_head" if key != "lm_head" else "o_proj"
    command = ("split", source, parts, "--part", f"{key}={SIZES[key]}", "--part", f"{other}=1")
    refused(reshard(*command, "--quiet"), 1, "holds a finished shard set")
    refused(reshard(*command, "--quiet", "--resume"), 1, "this split is for ")
    both = tuple(one for one in KEYS if one in (key, other))
    assert same(parts, right, *(one for one in KEYS if one != key))
    assert same(parts, right, key, together=both)  # finished as it was, and said to be one of the two
    assert reshard(*command, "--quiet", "--overwrite").code == 0
    assert same(parts, right, key, together=both)
    assert reshard("verify", parts, "--source", source, "--quiet").code == 0


def test_a_set_of_another_part_is_not_taken_for_ones_own(source: Path, right: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(right / "lm_head", tmp_path / "out"))
    command = ("split", source, out, "--part", "embedding", "--tp", 2, "--quiet")
    refused(reshard(*command), 1, "holds a finished shard set; choose another folder, or --overwrite it")
    says = "holds shards of lm_head, tp 2, this split is for embedding, tp 2; choose another folder, or --overwrite it"
    refused(reshard(*command, "--resume"), 1, says)
    assert snapshot(out) == snapshot(right / "lm_head")
    assert reshard(*command, "--overwrite").code == 0
    assert sorted(snapshot(out)) == [
        "config.json",
        *(f"embedding-rank-0000{rank}-of-00002.safetensors" for rank in (0, 1)),
        "manifest.json",
        "quant_model_description.json",
    ]


def test_no_sets_within_a_set_or_beside_one(source: Path, right: Path, parts: Path, tmp_path: Path) -> None:
    """Readers of such a folder would see one of them."""
    out = Path(shutil.copytree(right / "lm_head", tmp_path / "out"))
    refused(reshard("split", source, out, *ALL, "--quiet"), 1, "out: holds a shard set; several parts go into a folder")
    assert sorted(path.name for path in out.iterdir()) == sorted(snapshot(right / "lm_head"))
    done = reshard("split", source, parts, "--part", "lm_head", "--tp", 2, "--quiet")
    refused(done, 1, "holds denseffn, which is a folder, expected a file")


USAGE = {
    ("--part", "head"): "--part head: unknown part; known are denseffn, lm_head, embedding, o_proj",
    ("--part", ""): "--part : unknown part; known are",
    ("--part", "o_proj", "--part", "o_proj=4"): "--part o_proj: is there twice",
    ("--part", "o_proj=many"): "--part o_proj=many: 'many' is no group size; write it as o_proj=8",
    ("--part", "o_proj="): "--part o_proj=: '' is no group size",
    ("--part", "o_proj=100000000"): "'100000000' is no group size",
    ("--part", "lm_head", "--part", "o_proj=4"): "--tp: missing, and --part lm_head has no size of its own",
    (): "--tp: missing",
}


@pytest.mark.parametrize("options", USAGE)
def test_usage(source: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    refused(reshard("split", source, tmp_path / "out", *options), 2, USAGE[options])
    assert not (tmp_path / "out").exists()


def test_all_are_looked_at_before_any_is_written(source: Path, tmp_path: Path) -> None:
    done = reshard("split", source, tmp_path / "out", "--tp", 4, "--part", "lm_head", "--part", "o_proj=3", "--quiet")
    refused(done, 1, "dim 1 = 256 is not divisible by tp 3; use a tp of 1, 2, 4, 8")
    refused(
        reshard("split", source, tmp_path / "out", "--part", "lm_head=0"), 1, "tp 0: the LM head group has at least"
    )
    assert not (tmp_path / "out").exists()


# --- readers ---


def test_readers_of_all_sets(source: Path, parts: Path, tmp_path: Path) -> None:
    done = reshard("verify", parts, "--source", source, "--quiet", "--format", "json")
    assert done.code == 0, done.out
    assert [part["part"] for part in done.document["parts"]] == list(SIZES)
    assert done.document["ok"] is True
    assert [[layer["layer"] for layer in part["layers"]] for part in done.document["parts"]] == [
        [0], [None], [None], [0, 1],
    ]  # fmt: skip
    done = reshard("check", parts, "--against", source, "--format", "json")
    assert done.code == 0, done.out
    assert [report["target"].rpartition("/")[2] for report in done.document["targets"]] == list(SIZES)
    for form in ("junit", "github", "human"):
        assert reshard("check", parts, "--format", form).code == 0
    shard = parts / "embedding/embedding-rank-00000-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = reshard("verify", parts, "--source", source, "--quiet", "--format", "json")
    assert done.code == 3
    assert [part["ok"] for part in done.document["parts"]] == [True, True, False, True]
    done = reshard("verify", parts, "--quiet")
    assert (done.code, done.out.splitlines()[2:5:2]) == (3, ["lm_head:", "embedding:"])
    assert "digest: embedding-rank-00000-of-00001.safetensors: model.embed_tokens.weight: BLAKE3 is" in done.out
    refused(reshard("merge", parts, tmp_path / "merged", "--quiet"), 1, "embedding-rank-00000-of-00001.safetensors")
    shard.write_bytes(data[:-1])
    done = reshard("check", parts)
    assert done.code == 3
    assert "manifest.json says" in done.out


def test_inspect_shows_one_of_them(parts: Path) -> None:
    assert reshard("inspect", parts, "--format", "json").document["part"] == "denseffn"
    done = reshard("inspect", parts, "--part", "lm_head", "--format", "json")
    assert done.document["model"]["vocab_size"] == 100
    assert done.document["layers"][0]["index"] is None
    assert done.document["shard_set"]["padding"] == {"padded_size": 128, "multiple": 64}
    assert "vocab_size 100, LM head" in reshard("inspect", parts / "lm_head").out
    refused(
        reshard("inspect", parts / "lm_head", "--part", "o_proj"),
        2,
        "lm_head: is a set of lm_head, o_proj is asked for",
    )
    refused(reshard("check", parts / "lm_head", "--part", "o_proj"), 2, "lm_head: is a set of lm_head, o_proj is")
    shutil.rmtree(parts / "denseffn")
    refused(reshard("inspect", parts), 2, "parts: holds sets of lm_head, embedding, o_proj; say which with --part")
    shutil.rmtree(parts / "o_proj")
    refused(reshard("inspect", parts, "--part", "o_proj"), 2, "parts: holds sets of lm_head, embedding, none of o_proj")
    with pytest.raises(UsageError, match="say which with --part"):
        api.split(parts, parts.parent / "out", 2)


def test_several_are_cut_again(source: Path, parts: Path, tmp_path: Path) -> None:
    again = ("--part", "lm_head=4", "--part", "o_proj=2", "--part", "denseffn=2")
    assert reshard("split", parts, tmp_path / "again", *again, "--quiet").code == 0
    sizes = {"denseffn": 2, "lm_head": 4, "o_proj": 2}
    for key, size in sizes.items():
        split(source, tmp_path / "direct" / key, Cut(size, part=PARTS[key]))
    assert same(tmp_path / "again", tmp_path / "direct", *sizes, together=tuple(sizes))
    assert reshard("verify", tmp_path / "again", "--source", parts, "--quiet").code == 0
    assert reshard("check", tmp_path / "again", "--against", parts).code == 0
    api.split(parts, tmp_path / "library", 2, part="o_proj")
    assert snapshot(tmp_path / "library") == snapshot(tmp_path / "direct/o_proj")


def test_a_set_is_not_written_over_while_it_is_cut_again(parts: Path, right: Path) -> None:
    for options in (
        ("--part", "lm_head=4", "--part", "o_proj=2"),
        ("--part", "lm_head", "--part", "o_proj", "--tp", 2),
    ):
        done = reshard("split", parts, parts, *options, "--overwrite", "--quiet")
        refused(done, 1, "parts/lm_head: is the source itself; choose another folder for the shards")
    assert same(parts, right)


# --- what was cut together ---


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> Path:
    """All of them, cut by one command."""
    return split_parts(source, tmp_path / "whole", **SIZES)


LOST = {
    ("o_proj",): "lacks o_proj, cut together with embedding (its manifest.json says so): ",
    ("denseffn", "embedding"): "lacks denseffn, embedding, cut together with o_proj (its manifest.json says so): ",
    ("denseffn", "lm_head", "embedding"): "lacks denseffn, lm_head, embedding, cut together with o_proj (its ",
}


@pytest.mark.parametrize("lost", LOST)
def test_a_lost_set_is_missed(source: Path, whole: Path, tmp_path: Path, lost: tuple[str, ...]) -> None:
    """Of a folder that was not copied, an engine loads the part from the model, and nothing is saved of it."""
    for key in lost:
        shutil.rmtree(whole / key)
    kept = [key for key in KEYS if key not in lost]
    anew = ["split", str(whole), "OUT", *(word for key in kept for word in ("--part", f"{key}={SIZES[key]}"))]
    says = f"{whole}: {LOST[lost]}"
    refused(reshard("verify", whole, "--quiet"), 1, says)
    refused(reshard("merge", whole, tmp_path / "merged", "--quiet"), 1, f": reshard {' '.join(anew)}")
    done = reshard("check", whole, "--format", "json")
    assert done.code == 3
    wrong = [f for report in done.document["targets"] for f in report["findings"] if f["severity"] == "error"]
    assert [f["check"] for f in wrong] == ["parts"]
    assert wrong[0]["message"].startswith(says)
    assert reshard("verify", whole / kept[0], "--quiet").code == 0  # by itself it is whole
    anew[2] = str(tmp_path / "anew")
    assert reshard(*anew, "--quiet").code == 0
    assert reshard("verify", tmp_path / "anew", "--source", source, "--quiet").code == 0


def test_a_part_that_is_added_later(source: Path, right: Path, tmp_path: Path) -> None:
    """Cut beside the others by itself, nothing says that it belongs to them; --resume of all of them says it."""
    out = split_parts(source, tmp_path / "out", denseffn=4, o_proj=4)
    split(source, out / "lm_head", Cut(SIZES["lm_head"], part=PARTS["lm_head"]))
    assert reshard("verify", out, "--source", source, "--quiet").code == 0
    done = reshard("split", source, out, *ALL, "--resume", "--quiet", "--format", "json")
    assert done.code == 0, done.err
    kept = {part["part"]: {shard["kept"] for shard in part["shards"]} for part in done.document["parts"]}
    assert kept == {"denseffn": {True}, "lm_head": {True}, "embedding": {False}, "o_proj": {True}}
    assert same(out, right, together=KEYS)


@pytest.mark.parametrize("alone", [True, False])
def test_a_repaired_set_still_says_what_it_was_cut_with(source: Path, whole: Path, right: Path, alone: bool) -> None:
    (whole / "o_proj/o_proj-rank-00001-of-00004.safetensors").unlink()
    others = () if alone else ("--part", "embedding=1")
    out = whole / "o_proj" if alone else whole
    done = reshard("split", source, out, "--part", "o_proj=4", *others, "--resume", "--quiet")
    assert done.code == 0, done.err
    assert same(whole, right, together=KEYS)


# --- conversions ---


def test_what_is_converted_and_what_stays(tmp_path: Path) -> None:
    """config.json and the description say what a set holds: of a table that stays, what the source says."""
    pytest.importorskip("torch")
    source = tmp_path / "source"
    build(source, Model("fp8_block", hidden=256))
    for form in ("modelslim", "compressed-tensors"):
        out = tmp_path / form
        options = ("--tp", 2, "--weights", "w8a8", "--quant-format", form)
        done = reshard(
            "split", source, out, *options, "--part", "o_proj", "--part", "lm_head", "--part", "embedding", "--quiet"
        )
        assert done.code == 0, done.err
        for key in ("lm_head", "embedding"):
            assert sorted(snapshot(out / key)) == [
                "config.json",
                *(f"{key}-rank-0000{r}-of-00002.safetensors" for r in (0, 1)),
                "manifest.json",
            ]
            assert (out / key / "config.json").read_bytes() == (source / "config.json").read_bytes()
            assert json.loads((out / key / "manifest.json").read_text())["scheme"] == "bf16"
        config = json.loads((out / "o_proj/config.json").read_text())
        o_proj = "model.layers.{}.self_attn.o_proj"
        if form == "modelslim":
            assert "quantization_config" not in config
            types = json.loads((out / "o_proj/quant_model_description.json").read_text())
            named = {
                o_proj.format(n) + s: "W8A8_DYNAMIC"
                for n in (0, 1)
                for s in (".weight", ".weight_scale", ".weight_offset")
            }
            assert types == {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", **named}
        else:
            (group,) = config["quantization_config"]["config_groups"].values()
            assert group["targets"] == [r"re:(model\.layers\.0\.self_attn|model\.layers\.1\.self_attn)\.(o_proj)$"]
        assert reshard("verify", out, "--source", source, "--quiet").code == 0
    out = tmp_path / "bf16"
    parts = [option for key in KEYS for option in ("--part", key)]
    assert reshard("split", source, out, *parts, "--tp", 2, "--weights", "bf16", "--quiet").code == 0
    assert reshard("verify", out, "--source", source, "--quiet").code == 0
    assert "quantization_config" not in json.loads((out / "o_proj/config.json").read_text())
    assert json.loads((out / "o_proj/manifest.json").read_text())["scheme"] == "bf16"


# --- the Hub, processes, kills ---


@pytest.mark.parametrize("key", ["lm_head", "embedding", "o_proj"])
def test_of_a_hub_the_part_is_read_once(source: Path, right: Path, tmp_path: Path, key: str) -> None:
    with serving(Hub({COMMIT: source})) as hub:
        with opened(hub) as remote:
            prepared = prepare(remote, Cut(SIZES[key], part=PARTS[key]))
            write_shards(prepared, tmp_path / "out", SplitOptions())
            nbytes = prepared.checkpoint.nbytes
        same_but_for_the_origin(ORIGIN, tmp_path / "out", right / key)
        headers = {
            path.name: 8 + int.from_bytes(path.read_bytes()[:8], "little") for path in source.glob("*.safetensors")
        }
        served: Counter[tuple[str, int]] = Counter()
        for asked in hub.data_requests():
            if asked.is_weights:
                first, stop = asked.bounds
                served.update((asked.file, at) for at in range(max(first, headers[asked.file]), stop))
        assert len(served) == nbytes
        assert set(served.values()) == {1}


def test_of_a_hub_the_parts_share_what_is_read(
    source: Path, right: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Hub({COMMIT: source})) as hub:
        monkeypatch.setattr(hub_module, "find_repository", partial(hub_module.find_repository, endpoint=hub.url))
        done = reshard("split", REPO, tmp_path / "out", *ALL, "--quiet")
        assert done.code == 0, done.err
        served: Counter[tuple[str, int]] = Counter()
        for asked in hub.data_requests():
            if asked.is_weights:
                served.update((asked.file, at) for at in range(*asked.bounds))
    # The length of a header is asked for, and then the header with its length.
    assert {at for (_, at), times in served.items() if times > 1} == set(range(8))
    assert {file for file, _ in served} == {path.name for path in source.glob("*.safetensors")}


@pytest.mark.parametrize("change", ["replaced", "written over"])
def test_a_file_that_changes_between_two_parts(
    source: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first part needs nothing of it; its header is as it was then."""
    model = Path(shutil.copytree(source, tmp_path / "model"))
    file = next(file for file in sorted(model.glob("*.safetensors")) if b"lm_head" not in file.read_bytes())
    release = FolderSource.release
    released: list[str] = []

    def changing(self: FolderSource, name: str) -> None:
        release(self, name)
        if name == file.name and not released:
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            if change == "replaced":
                file.unlink()
            file.write_bytes(data)
            os.utime(file, ns=(1, 1))
            released.append(name)

    monkeypatch.setattr(FolderSource, "release", changing)
    done = reshard("split", model, tmp_path / "out", "--tp", 2, "--part", "lm_head", "--part", "o_proj", "--quiet")
    assert released
    assert done.code == 1, done.err
    assert f"{file.name}: is no longer the file whose header was read" in done.err
    assert not (tmp_path / "out").exists()


def test_a_team_writes_all_of_them(source: Path, right: Path, tmp_path: Path) -> None:
    command = [source, tmp_path / "out", *ALL]
    ended = processes(command, command)
    assert [done.code for done in ended] == [0, 0], ended
    assert same(tmp_path / "out", right, together=KEYS)


@pytest.mark.parametrize("at", ["replace o_proj-rank-00001-of-00004.safetensors #1", "replace manifest.json #1"])
def test_killed_and_gone_on_with(source: Path, right: Path, tmp_path: Path, at: str) -> None:
    job = faults.Job(source, tmp_path / "out", {"tp_size": 4, "part": "o_proj"}, at=at)
    assert faults.run(job).killed
    assert "manifest.json" not in snapshot(tmp_path / "out")
    refused(reshard("verify", tmp_path / "out"), 1, "holds shards and no manifest.json: the set is incomplete")
    done = reshard("split", source, tmp_path / "out", "--part", "o_proj", "--tp", 4, "--resume", "--quiet")
    assert done.code == 0, done.err
    assert snapshot(tmp_path / "out") == snapshot(right / "o_proj")


def test_the_library_says_what_is_no_part(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ReshardError, match="--part head: unknown part"):
        api.split(source, tmp_path / "out", 2, part="head")
    with pytest.raises(ReshardError, match="--part head: unknown part"):
        api.check(source, part="head")
    report = api.check(source, part="lm_head", tp=(2, 3))
    assert [(f.check, f.where, f.message) for f in report.findings if f.severity == "error"] == [
        (
            "divides",
            "tp 3",
            "lm_head.weight: dim 0 = 100, which engines pad to 128, is not divisible by tp 3; use a tp of 1, 2, 4, 8, "
            "16, 32, 64, 128",
        )
    ]
    assert ("divides", "tp 2", "vocab_size 100 padded to 128, 128 / 2 = 64") in [
        (f.check, f.where, f.message) for f in report.findings
    ]
