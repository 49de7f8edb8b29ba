"""`make test-cuda`'s script, on the CPU at small sizes: what it says, and that each of its checks can fail."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reshard_runtime.collectives import Collectives
from reshard_runtime.kernels.cuda import CudaKernels
from tests.cuda.__main__ import NEEDED, main
from tests.cuda.forward import check_collectives, check_ranks
from tests.cuda.kernels import check_products, check_refused, check_vectors
from tests.cuda.layers import SCHEMES, SMALL, make_layer

KERNELS = ("linear", "int8_matmul", "int8_linear", "gated", "gated_int8", "quantize_dynamic", "quantize_static")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_all_of_it_that_needs_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--size", "small", "--json", str(tmp_path / "found.json")]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine"]["device"] == "cpu"
    assert found["ok"]
    assert f"{len(found['checks'])} checks, none wrong" in out
    names = " ".join(check["name"] for check in found["checks"])
    for scheme in SCHEMES:
        assert f"{scheme}: rank 7 of 8" in names
        assert f"{scheme}: 8 ranks added up" in names
        assert f"{scheme}: DenseFFN over gloo, R = 1" in names
    for kernel in (
        "linear",
        "int8_matmul",
        "int8_linear",
        "quantize_dynamic",
        "quantize_static",
        "gated",
        "gated_int8",
    ):
        for tokens in SMALL.tokens:
            assert any(
                check["name"].startswith(kernel) and f"{tokens} tokens" in check["name"] for check in found["checks"]
            ), (kernel, tokens)
    (decode, loading) = found["figures"].values()
    assert [row["scheme"] for row in decode] == list(SCHEMES)
    assert [row["bytes"] for row in loading] == [1161216, 598272]
    assert "1161216" in out


def test_without_a_device_it_is_skipped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 0
    assert capsys.readouterr() == (f"tests.cuda: skipped: torch {torch.__version__} sees no CUDA device\n", "")


def test_packages_that_are_missing_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("blake3", "pydantic"):
        assert name in NEEDED
        monkeypatch.setitem(sys.modules, name, None)
    assert main([]) == 1
    assert " lacks blake3, pydantic; " in capsys.readouterr().err


def _off_by_one(result: torch.Tensor) -> torch.Tensor:
    """The last value of all, by the least that its type has to tell."""
    result = result.clone()
    last = result.view(-1)[-1:]
    last += 1 if not last.is_floating_point() else last.abs() * 2.0**-5 + 0.5
    return result


class Wrong(CudaKernels):
    """A backend of which one kernel is wrong in its last value."""

    def __init__(self, kernel: str) -> None:
        real = getattr(self, kernel)

        def wrong(*arguments: Any) -> Any:
            result = real(*arguments)
            if callable(result):
                return lambda *rest: self._spoilt(result(*rest))
            return self._spoilt(result)

        setattr(self, kernel, wrong)

    def _spoilt(self, result: Any) -> Any:
        return (result[0], _off_by_one(result[1])) if isinstance(result, tuple) else _off_by_one(result)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_wrong_kernel_is_told(kernel: str) -> None:
    kernels = Wrong(kernel)
    checks = [
        *check_vectors(kernels, SMALL, generator()),
        *check_products(kernels, make_layer("bf16", SMALL, generator()), generator()),
        *check_products(kernels, make_layer("w8a8_dynamic", SMALL, generator()), generator()),
    ]
    wrong = {check.name.split(" ")[0].rstrip(":,") for check in checks if not check.ok}
    assert {kernel} <= wrong <= {kernel, "gated_int8"}  # which quantizes, too


def test_tokens_that_are_not_kept_as_nan_are_told() -> None:
    class Keeps(CudaKernels):
        def keep_not_finite(self, y_TN: torch.Tensor, x_TK: torch.Tensor) -> torch.Tensor:
            return y_TN

    wrong = [check.name for check in check_vectors(Keeps(), SMALL, generator()) if not check.ok]
    assert len(wrong) == len(SMALL.tokens)
    assert all(name.startswith("keep_not_finite") for name in wrong)


def test_a_size_that_is_taken_is_told() -> None:
    class Takes(CudaKernels):
        def weight(self, name: str, weight_NK: torch.Tensor) -> torch.Tensor:
            return weight_NK

    assert [check.ok for check in check_refused(Takes(), "cpu")] == [False, False]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_rank_with_another_s_slice_is_told(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(scheme, SMALL, generator())
    real = type(layer).shard
    monkeypatch.setattr(
        type(layer), "shard", lambda self, rank, ranks: real(self, 2 if rank == 3 and self is layer else rank, ranks)
    )
    wrong = [check.name for check in check_ranks(layer, generator()) if not check.ok]
    assert [name.split(":")[1] for name in wrong] == [" rank 3 of 8, as on the CPU", " 8 ranks added up, as unsplit"]


def test_rows_that_do_not_come_back_are_told() -> None:
    class Swapped(Collectives):
        def gather(self, rows_PW: torch.Tensor, out: Any = None, counts: Any = ()) -> torch.Tensor:
            return super().gather(rows_PW, out).flip(0)

    class Kernels(CudaKernels):
        def collectives(self, group: torch.distributed.ProcessGroup) -> Collectives:
            return Swapped(group)

    wrong = [check.name for check in check_collectives(Kernels(), generator()) if not check.ok]
    assert [name.split(":")[0] for name in wrong] == ["gather", "gather"]
