"""The plugin in real vLLM servers, against the same server without it.

vLLM's CPU backend gives the same bits again only for one request at a time on a rank (its sums depend on how requests
are batched), so tokens are compared for those; many at once are only counted.
"""

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file

from reshard.plan.pipeline import Cut
from tests.support.running import split, split_parts
from tests.vllm.models import HIDDEN, INTERMEDIATE, VOCABULARY, poisoned, write_model
from tests.vllm.server import END_SECONDS, REQUEST_SECONDS, Answer, Server, serving

TOKENS = 8
LENGTHS = (1, 2, 3, 5, 8, 11, 16, 17, 23, 31, 32, 33, 40, 48, 63, 64)
# float32: a sum of 512 products in two parts instead of one differs by some 1e-7 of its size in each of three layers.
FLOAT32_LOGPROBS = 1e-5
# BF16 keeps 8 bits: logits of some 10 are known to 0.04, so two whose gap is below may change places.
BF16_GAP = 0.05
LAYER_BYTES = 3 * INTERMEDIATE * HIDDEN * 4


def _prompts() -> list[list[int]]:
    numbers = random.Random(7)
    return [[numbers.randrange(2, VOCABULARY) for _ in range(length)] for length in LENGTHS]


def _answers(server: Server, ranks: int) -> list[Answer]:
    """One request at a time on a rank: first with the others idle, then all busy with prompts of different lengths."""
    prompts = _prompts()
    if ranks == 1:
        return [server.complete(prompt, TOKENS) for prompt in prompts]
    alone = [server.complete(prompt, TOKENS, number % ranks) for number, prompt in enumerate(prompts)]
    longest_first = prompts[::-1]
    with ThreadPoolExecutor(2) as pool:
        both = [
            list(pool.map(server.complete, pair, (TOKENS, TOKENS), (0, 1)))
            for pair in zip(prompts[:8], longest_first[:8], strict=True)
        ]
    return alone + [answer for pair in both for answer in pair]


def _same(before: list[Answer], after: list[Answer], logprobs: float) -> None:
    for number, (a, b) in enumerate(zip(before, after, strict=True)):
        assert len(a.tokens) == TOKENS
        assert b.tokens == a.tokens, number
        assert max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)) <= logprobs, number


def _same_but_ties(before: list[Answer], after: list[Answer], gap: float) -> None:
    """Tokens are equal up to a place where the two likeliest were nearly so."""
    equal = 0
    for number, (a, b) in enumerate(zip(before, after, strict=True)):
        differing = [place for place, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y]
        equal += not differing
        if differing:
            assert a.gaps[differing[0]] <= gap, (number, differing[0], a, b)
    # How many depends on the processor's kernels: 7 of 16 with AMX, more without. A wrong layer leaves none.
    assert equal >= len(before) // 4


@pytest.fixture(scope="module")
def without(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """What the model says unsplit, float32."""
    with serving(tmp_path_factory.mktemp("without"), dense, data=2) as server:
        answers = _answers(server, 2)
    assert len({tuple(answer.tokens) for answer in answers}) >= 12  # a model that repeats itself would prove nothing
    return answers


def test_eager(dense: Path, without: list[Answer], tmp_path: Path) -> None:
    shards = dense.parent / "tp2"
    with serving(tmp_path, dense, shards=shards, data=2, VLLM_LOGGING_LEVEL="DEBUG") as server:
        _same(without, _answers(server, 2), FLOAT32_LOGPROBS)
        _many_at_once(server)
        log = server.log
    held = re.findall(r"rank ([01]) of 2 holds dense layers 0, 1, 2, ([0-9]+) bytes", log)
    assert sorted(held) == [("0", str(3 * LAYER_BYTES // 2)), ("1", str(3 * LAYER_BYTES // 2))]
    dealt = {
        rank: set(re.findall(rf"model\.layers\.0\.mlp rank {rank} of 2: tokens \(([0-9]+), ([0-9]+)\)", log))
        for rank in (0, 1)
    }
    assert dealt[0] == dealt[1]
    assert ("63", "1") in dealt[0]  # a prompt of 63 beside an idle rank's dummy
    assert ("1", "64") in dealt[0]
    assert len([pair for pair in dealt[0] if pair[0] != pair[1] and "1" not in pair]) >= 3


def _many_at_once(server: Server) -> None:
    """64 requests: all are answered, each with as many tokens as it asked for."""
    numbers = random.Random(8)
    wanted = [(length, numbers.randrange(1, 12)) for length in LENGTHS for _ in range(4)]
    prompts = [[numbers.randrange(2, VOCABULARY) for _ in range(length)] for length, _ in wanted]
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(server.complete, prompts, [tokens for _, tokens in wanted]))
    assert [len(answer.tokens) for answer in answers] == [tokens for _, tokens in wanted]


def test_compiled(dense: Path, tmp_path: Path) -> None:
    """Against vLLM compiled too: with AVX-512 its own log-probabilities are up to 0.5 from those of eager mode."""
    answers: list[list[Answer]] = []
    for shards in (None, dense.parent / "tp2"):
        cache = str(tmp_path / f"cache-{len(answers)}")
        with serving(tmp_path, dense, shards=shards, data=2, eager=False, VLLM_CACHE_ROOT=cache) as server:
            answers.append(_answers(server, 2))
            assert "saved AOT compiled function" in server.log
    _same(answers[0], answers[1], FLOAT32_LOGPROBS)


def test_a_wrong_shard_shows(dense: Path, without: list[Answer], tmp_path: Path) -> None:
    """That the comparison can fail: rank 1's down weights are zero, and digests are off."""
    shards = Path(shutil.copytree(dense.parent / "tp2", tmp_path / "tp2"))
    path = shards / "denseffn-rank-00001-of-00002.safetensors"
    raw, tensors = bytearray(path.read_bytes()), load_file(path)
    at = {name: raw.find(value.numpy().tobytes()) for name, value in tensors.items() if "down_proj" in name}
    assert len(at) == 3
    for name, start in at.items():
        raw[start : start + tensors[name].nbytes] = bytes(tensors[name].nbytes)
    path.write_bytes(raw)
    with serving(tmp_path, dense, shards=shards, data=2) as server:
        answers = _answers(server, 2)
    assert sum(a.tokens == b.tokens for a, b in zip(without, answers, strict=True)) <= len(without) // 8


def test_bf16_reduced_in_float32(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", dtype="bfloat16")
    split(model, tmp_path / "tp2", Cut(2))
    with serving(tmp_path, model, data=2, dtype="bfloat16") as server:
        before = _answers(server, 2)
    with serving(
        tmp_path, model, shards=tmp_path / "tp2", data=2, dtype="bfloat16", extra={"reduce_dtype": "float32"}
    ) as server:
        after = _answers(server, 2)
    _same_but_ties(before, after, BF16_GAP)


@pytest.fixture(scope="module")
def with_experts(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """What a model with experts says under tensor parallelism, float32."""
    with serving(tmp_path_factory.mktemp("engines"), mixed, tensor=2) as server:
        return _answers(server, 1)


def test_tensor_parallel_with_experts(mixed: Path, with_experts: list[Answer], tmp_path: Path) -> None:
    """The same weights in the same places: the same bits."""
    with serving(tmp_path, mixed, shards=mixed.parent / "tp2", tensor=2) as server:
        _same(with_experts, _answers(server, 1), 0.0)
        assert "rank 1 of 2 holds dense layers 0, 1" in server.log


def test_sets_of_all_parts(mixed: Path, with_experts: list[Answer], tmp_path: Path) -> None:
    """The same bits, from a model that has NaN in all that the sets hold."""
    sizes = dict.fromkeys(("denseffn", "lm_head", "embedding", "o_proj"), 2)
    shards = split_parts(mixed, tmp_path / "parts", **sizes)
    with serving(tmp_path, poisoned(mixed, tmp_path / "rest", sizes), shards=shards, tensor=2) as server:
        _same(with_experts, _answers(server, 1), 0.0)
        log = server.log
    held = {"dense layers 0, 1", "o_proj of layers 0-3", "the LM head", "the embedding"}
    assert all(f"rank {rank} of 2 holds {what}, " in log for rank in (0, 1) for what in held)


def test_w8a8(w8a8: Path, tmp_path: Path) -> None:
    """llm-compressor's model, with the engine's own int8 linears.

    A slice of down quantizes its own part of the tokens, so data parallelism with the plugin is compared with tensor
    parallelism without it. The layers are the same bits there (test_layers.py); attention, which tensor parallelism
    splits too, is not, and a token's value that is rounded to the next integer moves this model's logits by 0.03.
    """
    shards = w8a8.parent / "tp2"
    with serving(tmp_path, w8a8, tensor=2, dtype="bfloat16") as server:
        cut_by_the_engine = _answers(server, 1)
    with serving(tmp_path, w8a8, shards=shards, tensor=2, dtype="bfloat16") as server:
        _same(cut_by_the_engine, _answers(server, 1), 0.0)
    with serving(tmp_path, w8a8, shards=shards, data=2, dtype="bfloat16") as server:
        over_data_parallel_ranks = _answers(server, 2)[: len(LENGTHS)]
    _same_but_ties(cut_by_the_engine, over_data_parallel_ranks, BF16_GAP)


def test_a_bad_shard_stops_the_start(dense: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(dense.parent / "tp2", tmp_path / "tp2"))
    path = shards / "denseffn-rank-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with serving(tmp_path, dense, shards=shards, data=2, ready=False) as server:
        assert server.wait_until_ended(240) != 0
        log = server.log
    assert re.search(r"Worker_DP1.*ShardError: .*denseffn-rank-00001-of-00002.safetensors: [0-9]+ bytes, manifest", log)
    assert re.search(r"Worker_DP0.*GroupError: rank 1 of the group failed: .*denseffn-rank-00001-of-00002", log)


@pytest.fixture
def busy(dense: Path, tmp_path: Path) -> Iterator[Server]:
    """A split server whose rank 1 fails once the file `fault` is there."""
    folder = Path(__file__).parent / "faulty"
    with serving(
        tmp_path,
        dense,
        shards=dense.parent / "tp2",
        data=2,
        PYTHONPATH=os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        VLLM_PLUGINS="denseffn_shards,faulty",
        FAULTY=str(tmp_path / "fault"),
    ) as server:
        assert len(server.complete([5, 6, 7], TOKENS, 0).tokens) == TOKENS
        yield server


def _ends(server: Server) -> None:
    """A client hears of it, and the server goes down."""
    start = time.monotonic()
    with pytest.raises(httpx.HTTPError):
        server.complete([5, 6, 7], 200, 0)
    assert time.monotonic() - start < REQUEST_SECONDS
    assert server.wait_until_ended(END_SECONDS) is not None


def test_an_exception_on_one_rank_brings_the_server_down(busy: Server, tmp_path: Path) -> None:
    (tmp_path / "fault").touch()
    _ends(busy)
    assert "a fault that the test wants" in busy.log


def test_a_killed_worker_brings_the_server_down(busy: Server) -> None:
    os.kill(busy.workers()[1], signal.SIGKILL)
    _ends(busy)
