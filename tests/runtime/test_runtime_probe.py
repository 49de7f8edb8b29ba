"""Asking a model's own code what it computes: every activation is told from every other, in every type."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from reshard.errors import ShardError
from reshard.model.activation import GELU, SILU, Activation
from reshard.plan.pipeline import Cut
from reshard_runtime import DenseFFN
from reshard_runtime.kernels.cpu import CpuKernels
from reshard_runtime.probe import answers, disagreement
from reshard_runtime.serving.transformers import attach, load_model
from tests.support.activations import CASES, Case, checkpoint_of
from tests.support.running import split
from tests.support.unsplit import error

SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"num_hidden_layers": 2, "vocab_size": 64}
LIMITS = (None, 0.5, 7.0, 10.0)
EVERY = [Activation(case.activation.name, limit) for case in CASES.values() for limit in LIMITS]
EVERY = list(dict.fromkeys(EVERY))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", EVERY, ids=str)
def test_every_activation_is_told_from_every_other(activation: Activation, dtype: torch.dtype) -> None:
    """As kernels round it, and as transformers' modules do: the function once, and the product once more."""
    limit = activation.limit

    def twice(h: torch.Tensor) -> torch.Tensor:
        gate, up = h.chunk(2, -1)
        gate, up = (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))
        approximate = "tanh" if activation.name == "gelu_tanh" else "none"
        functional = nn.functional
        act = functional.silu(gate) if activation.name == SILU else functional.gelu(gate, approximate=approximate)
        return act * up

    for between in (CpuKernels().gated(activation), twice):
        found = answers(between, dtype)
        assert disagreement(found, activation, dtype) is None
        for other in EVERY:
            said = disagreement(found, other, dtype)
            assert (said is None) == (other == activation), (other, said)
            assert said is None or f", {other} makes " in said


def _quick(gate: torch.Tensor) -> torch.Tensor:
    return gate * torch.sigmoid(1.702 * gate)


OTHERS = {
    "quick gelu": lambda g, u: _quick(g) * u,
    "relu2": lambda g, u: g.relu() ** 2 * u,
    "situ": lambda g, u: 4 * torch.tanh(g / 4) * torch.sigmoid(g) * u,
    "up + 1": lambda g, u: nn.functional.silu(g) * (u + 1),
    "gate of up": lambda g, u: nn.functional.silu(u) * g,
    "a multiplier": lambda g, u: nn.functional.silu(g) * u * 1.05,
    "no numbers": lambda g, u: g * torch.nan,
    "the limit after silu": lambda g, u: nn.functional.silu(g).clamp(max=7) * u.clamp(-7, 7),
    "too few": lambda g, u: (g * u)[:, :2],
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_none_of_them_agrees_with_none(name: str) -> None:
    found = answers(lambda h: OTHERS[name](*h.chunk(2, -1)), torch.float32)
    for activation in EVERY:
        assert disagreement(found, activation, torch.float32) is not None


def test_the_line_names_the_values() -> None:
    found = answers(lambda h: nn.functional.relu(h[:, :32]) * h[:, 32:], torch.float32)
    assert "it makes 0, silu makes " in (disagreement(found, Activation(SILU), torch.float32) or "")


def _models(folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    for name, model in {
        "gelu": LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu")),
        "gemma": GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=16)),
        "silu": LlamaForCausalLM(LlamaConfig(**SIZES)),
    }.items():
        model.save_pretrained(folder / name)
        split(folder / name, folder / f"{name}-tp1", Cut(1))
    return {name: folder / name for name in ("gelu", "gemma", "silu")}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return _models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("how", ["attach", "load_model"])
@pytest.mark.parametrize("name", ["gelu", "gemma", "silu"])
def test_models_of_any_known_activation(models: dict[str, Path], name: str, how: str) -> None:
    path, ids = models[name], torch.arange(2, 10)[None]
    whole = AutoModelForCausalLM.from_pretrained(path)
    with torch.inference_mode():
        wanted = whole(ids).logits[0].double()
        shards = path.with_name(f"{name}-tp1")
        made = load_model(path, shards) if how == "load_model" else attach(whole, shards)
        assert isinstance(made.model.layers[0].mlp, DenseFFN)
        assert error(made(ids).logits[0], wanted) < 3e-6


@pytest.mark.parametrize("how", ["attach", "load_model"])
@pytest.mark.parametrize(("name", "other"), [("gelu", "silu"), ("silu", "gelu"), ("gelu", "gelu_pytorch_tanh")])
def test_a_set_of_another_activation_is_refused(
    models: dict[str, Path], tmp_path: Path, name: str, other: str, how: str
) -> None:
    """The same weights, and another config.json: also the two gelus, which BF16 results hardly tell apart."""
    model = tmp_path / "model"
    model.mkdir()
    save_file(load_file(models[name] / "model.safetensors"), model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((models[name] / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": other}))
    shards = models[name].with_name(f"{name}-tp1")
    with pytest.raises(ShardError, match=f"layer 0's activation is {name}, model.layers.0.mlp computes another: of g"):
        load_model(model, shards) if how == "load_model" else attach(
            AutoModelForCausalLM.from_pretrained(model), shards
        )


class _Layer(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp


class _Model(nn.Module):
    """Layers with a given MLP each, as a model of remote code may be."""

    def __init__(self, mlps: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(mlp) for mlp in mlps)


def _cut(tmp_path: Path, mlp: Any, config: dict[str, Any]) -> Path:
    split(checkpoint_of(mlp, tmp_path / "model", config), tmp_path / "shards", Cut(1))
    return tmp_path / "shards"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attach_to_transformers_mlps(tmp_path: Path, case: Case) -> None:
    mlp, x_TH = case.mlp(64, 256), torch.randn(6, 64)
    model = _Model([mlp])
    wanted = mlp.double()(x_TH.double())
    mlp.float()
    attach(model, _cut(tmp_path, mlp, case.config))
    assert isinstance(model.layers[0].mlp, DenseFFN)
    assert error(model.layers[0].mlp(x_TH), wanted) < 3e-6


def test_a_limit_that_the_set_lacks_is_refused(tmp_path: Path) -> None:
    limited = CASES["silu with a limit"].mlp(64, 256)
    shards = _cut(tmp_path, limited, CASES["silu"].config)
    with pytest.raises(ShardError, match=r"layer 0's activation is silu, .* computes another: of gate"):
        attach(_Model([limited]), shards)


class _Scaled(nn.Module):
    """An MLP with a multiplier that no name in a config tells of."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.gelu(self.gate_proj(x_TH)) * self.up_proj(x_TH)) * 1.25


class _Bound(_Scaled):
    """An MLP that reads its weights itself."""

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.gelu(x_TH @ self.gate_proj.weight.t()) * self.up_proj(x_TH))


def test_an_mlp_that_does_more_is_refused(tmp_path: Path) -> None:
    mlp = CASES["gelu"].mlp(64, 256)
    shards = _cut(tmp_path, mlp, CASES["gelu"].config)
    with pytest.raises(ShardError, match=f"layer 0's activation is {GELU}, layers.0.mlp computes another"):
        attach(_Model([_Scaled(mlp)]), shards)
    with pytest.raises(ShardError, match=r"layers.0.mlp: _Bound does not run without its weights, .* 'weight'"):
        attach(_Model([_Bound(mlp)]), shards)


def test_asking_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    mlp = CASES["gelu"].mlp(64, 256)
    shards = _cut(tmp_path, mlp, CASES["silu"].config)
    model = _Model([mlp])
    x_TH, before = torch.randn(3, 64), dict(mlp.named_modules())
    wanted = mlp(x_TH)
    with pytest.raises(ShardError, match="computes another"):
        attach(model, shards)
    assert model.layers[0].mlp is mlp
    assert dict(mlp.named_modules()) == before
    assert torch.equal(mlp(x_TH), wanted)
