"""Every kernel of the device's backend against the CPU backend's, with the same inputs: at R1's sizes.

Where a kernel is sums of integers and single IEEE operations, the bits must be the same. Shapes: T tokens, K
in_features, N out_features, L what a gated product has of each.
"""

from collections.abc import Iterator

import torch

from reshard.errors import ShardError
from reshard.model.activation import GELU, GELU_TANH, SILU, Activation
from reshard_runtime.kernels import Kernels
from reshard_runtime.kernels.cpu import CpuKernels
from tests.cuda.layers import Layer, Sizes, floats, integers
from tests.cuda.report import Check, exact, levels, near

# Both round a float32 sum to BF16 (2^-9), and a product that the device splits may add its parts in BF16.
BF16 = 2.0**-7
_FLOAT = 2.0**-20  # what exp and erf of two libraries may differ by
_FEW = 64  # tokens up to which every activation is asked
_SHARE = 1e-3  # of levels that lie so near the middle between two that the last bit of a scale decides
_ACTIVATIONS = [Activation(name, limit) for name in (SILU, GELU, GELU_TANH) for limit in (None, 7.0)]


def check_products(kernels: Kernels, layer: Layer, generator: torch.Generator) -> Iterator[Check]:
    """A layer's products, for every number of tokens, at full size."""
    cpu, on_cpu = CpuKernels(), layer.to("cpu")
    for linear, reference in ((layer.gate_up, on_cpu.gate_up), (layer.down, on_cpu.down)):
        weight = linear.tensors["weight"]
        own, on_host = kernels.weight(linear.name, weight), cpu.weight(linear.name, reference.tensors["weight"])
        for count in layer.sizes.tokens:
            name = f"{linear.name} {list(weight.shape)}, {count} tokens"
            if layer.scheme == "bf16":
                x_TK = floats(generator, count, weight.shape[1])
                yield near(f"linear: {name}", kernels.linear(x_TK, own), cpu.linear(x_TK.cpu(), on_host), BF16, BF16)
                continue
            q_TK = integers(generator, count, weight.shape[1])
            sums_TN = cpu.int8_matmul(q_TK.cpu(), on_host).to(torch.int32)
            yield exact(f"int8_matmul: {name}", kernels.int8_matmul(q_TK, own), sums_TN)
            yield exact(f"int8_linear: {name}", *_scaled(kernels, q_TK, own, sums_TN, generator))


class _Given(CpuKernels):
    """With the sums of a product that has been made."""

    def __init__(self, sums_TN: torch.Tensor) -> None:
        super().__init__()
        self._sums = sums_TN

    def int8_matmul(self, q_TK: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._sums


def _scaled(
    kernels: Kernels, q_TK: torch.Tensor, weight: torch.Tensor, sums_TN: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product with a bias and both scales, in BF16, on both."""
    rows, device = sums_TN.shape[1], generator.device
    bias_N = torch.randint(-(2**20), 2**20, (rows,), generator=generator, device=device, dtype=torch.int32)
    scale_N, token_T = (torch.rand(n, generator=generator, device=device) for n in (rows, len(q_TK)))
    found = kernels.int8_linear(q_TK, weight, scale_N, token_T, bias_N, torch.bfloat16)
    cpu = _Given(sums_TN)
    return found, cpu.int8_linear(q_TK, weight, scale_N.cpu(), token_T.cpu(), bias_N.cpu(), torch.bfloat16)


def check_vectors(kernels: Kernels, sizes: Sizes, generator: torch.Generator) -> Iterator[Check]:
    """What stands between the products, for every number of tokens, at a layer's full size."""
    cpu, hidden, inner = CpuKernels(), sizes.hidden, sizes.intermediate
    scales = torch.tensor([20.0, 3.0], device=generator.device)
    for count in sizes.tokens:
        of = f"{count} tokens"
        x_TH, h_T2L = floats(generator, count, hidden), floats(generator, count, 2 * inner)
        (q_TH, scale_T), (wanted_TH, wanted_T) = kernels.quantize_dynamic(x_TH), cpu.quantize_dynamic(x_TH.cpu())
        yield near(f"quantize_dynamic, scales: {of}", scale_T, wanted_T, _FLOAT, _FLOAT)
        yield levels(f"quantize_dynamic: {of}", q_TH, wanted_TH, _SHARE)
        found, wanted = (
            k.quantize_static(x, *v.split(1)) for k, x, v in ((kernels, x_TH, scales), (cpu, x_TH.cpu(), scales.cpu()))
        )
        yield exact(f"quantize_static: {of}", found, wanted)
        x_TH[0, 1], x_TH[-1, 0] = torch.nan, torch.inf
        found, wanted = (k.keep_not_finite(x[:, :8].clone(), x) for k, x in ((kernels, x_TH), (cpu, x_TH.cpu())))
        yield exact(f"keep_not_finite: {of}", found, wanted)
        for activation in _ACTIVATIONS if count <= _FEW else _ACTIVATIONS[:1]:
            found, wanted = (k.gated(activation)(h.clone()) for k, h in ((kernels, h_T2L), (cpu, h_T2L.cpu())))
            yield near(f"gated {activation}: {of}", found, wanted, BF16, _FLOAT)
            yield from _gated_int8(kernels, cpu, activation, generator, count, inner)


def _gated_int8(
    kernels: Kernels, cpu: CpuKernels, activation: Activation, generator: torch.Generator, count: int, inner: int
) -> Iterator[Check]:
    device, most = generator.device, 10_000
    sums = torch.randint(-most, most, (count, 2 * inner), generator=generator, device=device, dtype=torch.int32)
    scale, token = (torch.rand(n, generator=generator, device=device).add_(0.5) for n in (2 * inner, count))
    token /= most
    found, reference = kernels.gated_int8(activation), cpu.gated_int8(activation)
    if found is None or reference is None:
        raise AssertionError("no kernel")
    (q_TL, scale_T), (wanted_TL, wanted_T) = found(sums, scale, token), reference(sums.cpu(), scale.cpu(), token.cpu())
    name = f"gated_int8 {activation}: {count} tokens"
    yield near(f"{name}, scales", scale_T, wanted_T, 2.0**-16, _FLOAT)
    yield levels(name, q_TL, wanted_TL, _SHARE)


def check_refused(kernels: Kernels, device: str) -> Iterator[Check]:
    """Sizes that the int8 product does not take are refused when a layer is made, by the weight's name."""
    for shape in ((12, 16), (16, 12)):
        try:
            kernels.weight("a.weight", torch.zeros(shape, dtype=torch.int8, device=device))
            off = torch.inf
        except ShardError as error:
            off = 0.0 if f"a.weight: {list(shape)}" in str(error) else torch.inf
        yield Check(f"an int8 weight {list(shape)} is refused", off)
