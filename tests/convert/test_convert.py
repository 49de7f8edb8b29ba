"""`--weights`: bit for bit what plain torch makes of whole tensors, whatever the ranks, the workers and the steps."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reshard.plan.pipeline import Cut
from reshard.writer.split import SplitOptions
from tests.support.builders import Spec, build, dense_only, read_safetensors
from tests.support.conversions import (
    CONVERTIBLE,
    FORMATS,
    TARGETS,
    bf16,
    one_file,
    reference,
    rewrite,
    to_torch,
)
from tests.support.cut_by_hand import check_set
from tests.support.faults import TIMEOUT
from tests.support.paths import ROOT
from tests.support.running import split
from tests.support.sets import no_fsync, snapshot  # noqa: F401

torch = pytest.importorskip("torch")

# --- the reference: whole tensors, plain torch ---


def held(folder: Path, name: str) -> list[Any]:
    """A tensor as each rank holds it."""
    return [to_torch(read_safetensors(path)[name]) for path in sorted(folder.glob("*.safetensors"))]


# --- the values ---


@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize(("weights", "quant_format"), TARGETS)
@pytest.mark.parametrize("recipe", CONVERTIBLE)
def test_the_bits_are_those_of_whole_tensors(
    tmp_path: Path, recipe: str, weights: str, quant_format: str, layout: str
) -> None:
    """Also over 8 ranks: I/R = 64 is off the source's block grid, which the result no longer has."""
    wanted = reference(dense_only(build(tmp_path / "source", Spec(recipe))), weights, quant_format)
    for tp in (1, 8):
        out = tmp_path / f"tp{tp}"
        split(tmp_path / "source", out, Cut(tp, layout, weights=weights, quant_format=quant_format))
        check_set(out, wanted, tp, 512 // tp, layout)


@pytest.mark.parametrize(("weights", "quant_format"), TARGETS)
@pytest.mark.parametrize("recipe", ["bf16", "fp8_block", "ct_fp8_channel"])
def test_padded_and_odd_sizes(tmp_path: Path, recipe: str, weights: str, quant_format: str) -> None:
    """Blocks that are cut off on both sides; padding is zeros in the result, not a conversion of zeros."""
    spec = Spec(recipe, hidden=200, intermediate=300, dense=1)
    wanted = reference(dense_only(build(tmp_path / "source", spec)), weights, quant_format)
    split(tmp_path / "source", tmp_path / "out", Cut(8, pad=True, weights=weights, quant_format=quant_format))
    check_set(tmp_path / "out", wanted, 8, 38, "fused")


@pytest.mark.parametrize(("weights", "quant_format"), TARGETS)
def test_workers_and_steps_change_nothing(
    tmp_path: Path, weights: str, quant_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "source", Spec("fp8_block", hidden=200, intermediate=512))
    cut = Cut(4, weights=weights, quant_format=quant_format)
    split(tmp_path / "source", tmp_path / "1", cut, SplitOptions(workers=1))
    split(tmp_path / "source", tmp_path / "4", cut, SplitOptions(workers=4))
    monkeypatch.setattr("reshard.writer.stream.STAGE_BYTES", 4096)
    monkeypatch.setattr("reshard.convert.compute._CHUNK_ELEMENTS", 700)
    split(tmp_path / "source", tmp_path / "small", cut, SplitOptions(workers=3))
    assert snapshot(tmp_path / "4") == snapshot(tmp_path / "1")
    assert snapshot(tmp_path / "small") == snapshot(tmp_path / "1")


def with_nan(folder: Path) -> tuple[str, Any]:
    """An FP8 checkpoint of which some weights are NaN: one tensor's name, and where."""
    name = "model.layers.0.mlp.down_proj.weight"
    dtype, shape, data = build(folder, one_file("fp8_block"))[name]
    codes = np.frombuffer(data, np.uint8).reshape(shape).copy()
    codes[3, 3:500:7] = 0x7F
    codes[5, 8:13] = 0xFF
    rewrite(folder, {name: (dtype, shape, codes.tobytes())})
    return name, torch.from_numpy((codes & 0x7F) == 0x7F)


def test_what_is_no_number_is_the_same_whatever_the_ranks(tmp_path: Path) -> None:
    """FP8 can hold NaN; as BF16 it stays one, in the same bits for any cut."""
    source = tmp_path / "source"
    name, where = with_nan(source)
    for tp in (1, 8, 32):
        split(source, tmp_path / f"tp{tp}", Cut(tp, weights="bf16"))
    whole = torch.cat(held(tmp_path / "tp1", name), dim=1)
    assert torch.equal(torch.isnan(whole), where)
    for tp in (8, 32):
        pieces = torch.cat(held(tmp_path / f"tp{tp}", name), dim=1)
        assert torch.equal(pieces.view(torch.int16), whole.view(torch.int16)), f"tp {tp}"


PLAIN_PROCESSOR = """
import sys
from pathlib import Path
from reshard.plan.pipeline import Cut
from reshard.writer.split import SplitOptions
from tests.support.running import split
folder = Path(sys.argv[1])
for line in sys.argv[2:]:
    source, weights, quant_format = line.split()
    split(folder / source, folder / "plain" / line, Cut(4, weights=weights, quant_format=quant_format))
"""


@pytest.fixture(scope="module")
def plain_processor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources, and what a processor without vector instructions makes of them in `plain`."""
    folder = tmp_path_factory.mktemp("processors")
    build(folder / "numbers", Spec("fp8_block", hidden=200, intermediate=512))
    with_nan(folder / "nan")
    jobs = [f"numbers {weights} {quant_format}" for weights, quant_format in TARGETS] + ["nan bf16 modelslim"]
    subprocess.run(
        [sys.executable, "-c", PLAIN_PROCESSOR, str(folder), *jobs],
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        check=True,
        timeout=TIMEOUT,
    )
    return folder


@pytest.mark.parametrize(
    ("source", "weights", "quant_format"), [*(("numbers", *t) for t in TARGETS), ("nan", *TARGETS[0])]
)
def test_another_processor_changes_nothing(
    tmp_path: Path, plain_processor: Path, source: str, weights: str, quant_format: str
) -> None:
    split(plain_processor / source, tmp_path / "out", Cut(4, weights=weights, quant_format=quant_format))
    assert snapshot(tmp_path / "out") == snapshot(plain_processor / "plain" / f"{source} {weights} {quant_format}")


@pytest.mark.parametrize("quant_format", FORMATS)
def test_scales_of_down_are_over_the_full_input(tmp_path: Path, quant_format: str) -> None:
    """Every row's largest weight lies in the last rank's columns; a scale per slice would be 100 times smaller."""
    source, name = tmp_path / "source", "model.layers.0.mlp.down_proj"
    build(source, one_file("bf16"))
    values = torch.full((256, 512), 1.0)
    values[:, 511] = 127.0
    rewrite(source, {f"{name}.weight": bf16(values)})
    split(source, tmp_path / "out", Cut(4, weights="w8a8", quant_format=quant_format))
    for rank, (weight, scale) in enumerate(
        zip(held(tmp_path / "out", f"{name}.weight"), held(tmp_path / "out", f"{name}.weight_scale"), strict=True)
    ):
        assert scale.shape == (256, 1)
        assert (scale == 1).all()
        assert (weight[:, :127] == 1).all()
        assert (weight[:, 127] == (127 if rank == 3 else 1)).all()


@pytest.mark.parametrize("quant_format", FORMATS)
def test_ties_go_to_even_and_rows_of_zeros_stay_zeros(tmp_path: Path, quant_format: str) -> None:
    source, name = tmp_path / "source", "model.layers.1.mlp.up_proj"
    build(source, one_file("bf16"))
    values = torch.zeros(512, 256)
    values[0, :8] = torch.tensor([127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    values[2, 1] = -3.0
    rewrite(source, {f"{name}.weight": bf16(values)})
    split(source, tmp_path / "out", Cut(1, "separate", weights="w8a8", quant_format=quant_format))
    (weight,), (scale,) = (held(tmp_path / "out", f"{name}.{suffix}") for suffix in ("weight", "weight_scale"))
    assert weight[0, :8].tolist() == [127, -127, 0, 2, 2, 0, -2, -2]
    assert weight[2, 1] == -127
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    rest = weight.clone()
    rest[0, :8], rest[2, 1] = 0, 0
    assert not rest.any()


@pytest.mark.parametrize("quant_format", FORMATS)
@pytest.mark.parametrize("size", [1e-38, 3e-39, 1e-40])
def test_rows_too_small_for_their_scale(tmp_path: Path, size: float, quant_format: str) -> None:
    """max / 127 is below the smallest BF16: the scale must not become 0, nor the weights what 0/0 gives."""
    source, name = tmp_path / "source", "model.layers.0.mlp.gate_proj"
    build(source, one_file("bf16"))
    values = torch.zeros(512, 256)
    values[:, ::2] = size
    stored = bf16(values)
    rewrite(source, {f"{name}.weight": stored})
    split(source, tmp_path / "out", Cut(1, "separate", weights="w8a8", quant_format=quant_format))
    (weight,), (scale,) = (held(tmp_path / "out", f"{name}.{suffix}") for suffix in ("weight", "weight_scale"))
    assert (scale > 0).all()
    assert not weight[:, 1::2].any()
    error = (weight.double() * scale.double() - to_torch(stored).double()).abs()
    assert (error <= torch.clamp(scale.double(), min=1e-40)).all()
