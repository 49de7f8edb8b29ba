"""The formulas: verify's in float64, the runtime's in torch, and the MLPs of transformers, each against another."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.model.activation import FORMULAS, SILU, Activation, not_computed
from reshard.verification import gate
from reshard_runtime.kernels import base
from reshard_runtime.kernels.cpu import CpuKernels
from tests.support.activations import CASES, LIMIT, Case

HIDDEN = 64  # the least that every config takes
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
by_name = pytest.mark.parametrize("name", FORMULAS)
# One by one, by Python's own functions.
SCALAR = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}


def test_every_formula_is_computed_everywhere() -> None:
    assert FORMULAS.keys() == gate.FUNCTIONS.keys() == base.FUNCTIONS.keys() == SCALAR.keys()


@by_name
@given(st.floats(-700, 700))
def test_float64_is_the_formula(name: str, x: float) -> None:
    found = gate.FUNCTIONS[name].of(np.array([x]))[0]
    # Below 0 the scalar's 1 + erf or 1 + tanh cancels: exact to a few roundings of x.
    assert found == pytest.approx(SCALAR[name](x), rel=1e-14, abs=1e-15 * abs(x))


@by_case
@settings(max_examples=100)
@given(st.tuples(*[st.floats(-50, 50)] * 2), st.tuples(*[st.floats(-0.1, 0.1)] * 2))
def test_no_error_is_carried_further_than_the_bound(
    case: Case, at: tuple[float, float], errors: tuple[float, float]
) -> None:
    """The first order with what two errors make together."""
    g, u, dg, du = (np.array([value]) for value in (*at, *errors))
    found = gate.gated(case.activation, g + dg, u + du) - gate.gated(case.activation, g, u)
    bound = gate.carried(case.activation, g, u, abs(dg), abs(du)) + gate.FUNCTIONS[case.activation.name].slope * abs(
        dg * du
    )
    assert abs(found[0]) <= bound[0] * (1 + 1e-9) + 1e-12


@by_name
def test_the_slope_is_the_largest(name: str) -> None:
    x = np.linspace(-30, 30, 600_001)
    function = gate.FUNCTIONS[name]
    steepest = np.abs(np.diff(function.of(x)) / np.diff(x)).max()
    assert steepest <= function.slope <= 1.01 * steepest


def _grid(dtype: torch.dtype) -> torch.Tensor:
    """[T, 2L]: gate and up, small and large, with every pair of signs."""
    magnitudes = torch.tensor([0.0, 1e-6, 0.1, LIMIT, 0.75, 1.5, 2.25, 4.0, 9.0, 30.0])
    values = torch.cat([magnitudes, -magnitudes])
    return torch.cartesian_prod(values, values).to(dtype)


@by_case
def test_torch_and_float64_and_transformers_agree(case: Case) -> None:
    h = _grid(torch.float64)
    g, u = h.chunk(2, dim=-1)
    wanted = gate.gated(case.activation, g.numpy(), u.numpy())
    found = base.gated(case.activation)(h.clone())
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(_of_transformers(case, h).numpy(), wanted, rtol=1e-13, atol=1e-14)


def _of_transformers(case: Case, h_T2: torch.Tensor) -> torch.Tensor:
    """Its MLP of intermediate size 1: gate is the first value of a token, up the second."""
    mlp = case.mlp(HIDDEN, 1).double()
    for role, at in (("gate", 0), ("up", 1)):
        weight = getattr(mlp, f"{role}_proj").weight
        weight.zero_()
        weight[0, at] = 1
    mlp.down_proj.weight.fill_(1)
    return mlp(torch.nn.functional.pad(h_T2, (0, HIDDEN - 2)))[:, :1]


@by_case
@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24)])
def test_kernels_compute_in_float32_and_round_once(case: Case, dtype: torch.dtype, digits: int) -> None:
    h = _grid(dtype)
    g, u = h.double().numpy().T[:, :, None]
    wanted = torch.from_numpy(gate.gated(case.activation, g, u))
    found = CpuKernels().gated(case.activation)(h)
    assert found.dtype == dtype
    # Half a unit in the last place, and float32's own error: of the result, and of gate * up where 1 + erf cancels.
    least = torch.finfo(dtype).smallest_normal
    allowed = wanted.abs().clamp_min(least) * (2.0**-digits + 2.0**-21) + torch.from_numpy(abs(g * u)) * 2.0**-22
    assert ((found.double() - wanted).abs() <= allowed).all()


@by_case
def test_what_is_no_number_stays_none(case: Case) -> None:
    """A limit must not hide it."""
    special = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    h = torch.cartesian_prod(special, special)
    module = case.mlp(HIDDEN, 1)
    g, u = h.chunk(2, dim=-1)
    clamped = (g, u) if case.activation.limit is None else (g.clamp(max=LIMIT), u.clamp(-LIMIT, LIMIT))
    wanted = module.act_fn(clamped[0]) * clamped[1]
    torch.testing.assert_close(CpuKernels().gated(case.activation)(h.clone()), wanted, equal_nan=True)
    with np.errstate(all="ignore"):
        exact = gate.gated(case.activation, g.double().numpy(), u.double().numpy())
    assert np.array_equal(np.isnan(exact), wanted.isnan().numpy())
    assert wanted.isnan().sum() >= 7


@by_case
def test_the_int8_path_quantizes_what_the_formula_gives(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    sums = torch.randint(-(2**20), 2**20, (6, 80), dtype=torch.int32, generator=generator)
    scale, token = (torch.rand(size, generator=generator) * factor for size, factor in ((80, 1e-5), (6, 1.0)))
    formula = CpuKernels().gated_int8(case.activation)
    assert formula is not None
    q_TL, scale_T = formula(sums, scale, token)
    g, u = (sums.double() * scale.double() * token.double()[:, None]).chunk(2, -1)
    wanted = gate.gated(case.activation, g.numpy(), u.numpy())
    assert q_TL.dtype == torch.int8
    found = q_TL.double().numpy() * scale_T.double().numpy()[:, None]
    assert (np.abs(found - wanted) <= scale_T.numpy()[:, None] * 0.501).all()  # half a step
    np.testing.assert_allclose(scale_T.numpy(), np.abs(wanted).max(1) / 127, rtol=1e-6)


def test_what_is_not_computed_is_said_by_name() -> None:
    assert not_computed(Activation(SILU, 10.0)) is None
    unknown = not_computed(Activation("situ", 4.0)) or ""
    assert unknown.startswith("its activation is situ with limit 4, whose formula is not known here")
    assert "silu, gelu, gelu_tanh" in unknown
    assert not_computed(None, config=False) == (
        "its activation is not known: there is no config.json; put the model's beside the weights, and cut them again"
    )
    assert not_computed(None, config=True) == (
        'its activation is not known: config.json names none; write the model\'s hidden_act ("silu", …) there, and cut '
        "them again"
    )
    assert "no config.json stood beside the weights, or it names none" in (not_computed(None) or "")
