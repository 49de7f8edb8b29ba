"""attach and load_model on wrappers and stacked MLPs: only the language model's dense layers change."""

import json
import logging
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

from reshard.errors import ShardError
from reshard.model.naming import parse_tensor
from reshard.plan.pipeline import Cut
from reshard_runtime.serving.transformers import attach, load_model
from tests.support.builders import read_safetensors, write_safetensors
from tests.support.distributed import Ranks
from tests.support.records import Records
from tests.support.running import split
from tests.support.unsplit import error
from tests.support.wrapped import CASES, HIDDEN, INTERMEDIATE, VOCABULARY, bitnet, llama4

transformers.utils.logging.disable_progress_bar()

Start = Callable[[int], Ranks]
FLOAT32_BOUND = 3e-6  # as in test_runtime_transformers.py
by_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By a case's name: a folder with the model, its set `tp2`, and the model with NaN in what the set holds."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = folder = tmp_path_factory.mktemp("model")
            case = CASES[name]
            split(case.write(folder / "model"), folder / "tp2", Cut(2))
            for path in case.write(folder / "poisoned").glob("*.safetensors"):
                tensors = read_safetensors(path)
                for key, (kind, shape, data) in tensors.items():
                    parsed = parse_tensor(key)
                    if parsed is not None and parsed.prefix == case.prefix:
                        tensors[key] = (kind, shape, b"\xff" * len(data))
                write_safetensors(path, tensors, {"format": "pt"})
        return made[name]

    return of


def _loaded(model: Path) -> Any:
    """As transformers loads it."""
    config = transformers.AutoConfig.from_pretrained(model)
    return getattr(transformers, config.architectures[0]).from_pretrained(model).eval()


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in chain(model.named_parameters(), model.named_buffers())}


def _run(
    group: dist.ProcessGroup, how: str, model: Path, shards: Path, ids: list[torch.Tensor]
) -> tuple[str, torch.Tensor, dict[str, torch.Tensor], list[str], list[str]]:
    """(the model's class, logits, tensors, what was replaced, what transformers said)."""
    records = Records()
    logging.getLogger("transformers").addHandler(records)
    try:
        ours = load_model(model, shards, group) if how == "load_model" else attach(_loaded(model), shards, group)
    finally:
        logging.getLogger("transformers").removeHandler(records)
    with torch.inference_mode():
        logits = ours(input_ids=ids[group.rank()]).logits.flatten(0, 1).clone()
    replaced = [name for name, module in ours.named_modules() if type(module).__name__ == "DenseFFN"]
    return type(ours).__name__, logits, _tensors(ours), replaced, records.messages


@pytest.mark.parametrize("how", ["attach", "load_model"])
@by_case
def test_it_is_the_unsplit_model_with_its_dense_layers_replaced(
    ranks: Start, folders: Callable[[str], Path], case: str, how: str
) -> None:
    folder, wanted = folders(case), CASES[case]
    manifest = json.loads((folder / "tp2" / "manifest.json").read_text())
    assert manifest["model"]["prefix"] == wanted.prefix
    whole = _loaded(folder / "model")
    before = _tensors(whole)
    ids = list(torch.randint(3, VOCABULARY - 16, (2, 2, 9), generator=torch.Generator().manual_seed(1)))
    with torch.inference_mode():
        reference = torch.cat([whole(input_ids=own).logits.flatten(0, 1) for own in ids]).double()
    model = folder / ("poisoned" if how == "load_model" else "model")
    found = ranks(2).run(_run, how, model, folder / "tp2", ids)
    assert error(torch.cat([logits for _, logits, *_ in found]), reference) <= FLOAT32_BOUND
    dense = [f"{wanted.layers}.{index}.mlp" for index in wanted.dense]
    for kind, _, after, replaced, said in found:
        assert kind == type(whole).__name__
        assert replaced == dense
        assert said == []
        rest = {name for name in before if not name.startswith(tuple(f"{mlp}." for mlp in dense))}
        assert {name for name in after if not name.startswith(tuple(f"{mlp}." for mlp in dense))} == rest
        assert all(torch.equal(before[name], after[name]) for name in rest)
        assert wanted.tower is None or any(name.startswith(wanted.tower) for name in rest)
        for mlp in dense:
            assert after[f"{mlp}.gate_up_proj.weight"].shape == (INTERMEDIATE, HIDDEN)
            assert after[f"{mlp}.down_proj.weight"].shape == (HIDDEN, INTERMEDIATE // 2)


@by_case
def test_its_files_are_poisoned_where_the_set_is_used(folders: Callable[[str], Path], case: str) -> None:
    """That the test above can fail."""
    model = _loaded(folders(case) / "poisoned")
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isnan().all()


def test_a_wrapper_of_another_size_is_refused_by_the_name_of_its_layer(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    split(folders("GLM-4.5V") / "model", tmp_path / "tp1", Cut(1))
    model = _loaded(folders("Mistral 3") / "model")
    with pytest.raises(ShardError, match=r"dense layers are \[0\], Mistral3ForConditionalGeneration's are \[0, 1\]"):
        attach(model, tmp_path / "tp1")
    smaller = CASES["Qwen3.5"].make()
    for layer in smaller.model.language_model.layers:
        layer.mlp.down_proj = nn.Linear(2 * INTERMEDIATE, HIDDEN, bias=False)
    split(folders("Mistral 3") / "model", tmp_path / "other", Cut(1))
    with pytest.raises(
        ShardError, match=r"model.language_model.layers.0.mlp: gate and up have 1024 rows in all, down has 1024"
    ):
        attach(smaller, tmp_path / "other")


class _UpFirst(nn.Module):
    """An MLP that stacks up above gate."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.activation_fn = mlp.gate_up_proj, mlp.down_proj, mlp.activation_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.activation_fn(gate) * up)


def test_up_above_gate_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    split(folders("Phi-3") / "model", tmp_path / "tp1", Cut(1))
    model = _loaded(folders("Phi-3") / "model")
    model.model.layers[1].mlp = _UpFirst(model.model.layers[1].mlp)
    with pytest.raises(ShardError, match=r"model\.layers\.1\.mlp computes another: of gate .* and up .* it makes"):
        attach(model, tmp_path / "tp1")


def test_what_a_layer_does_not_call_mlp_is_refused_by_name(folders: Callable[[str], Path], tmp_path: Path) -> None:
    split(folders("GLM-4.5V") / "model", tmp_path / "tp1", Cut(1))
    with pytest.raises(ShardError, match=r"Llama4ForCausalLM's are \[\]; model\.layers\.0\.feed_forward is none"):
        attach(llama4(), tmp_path / "tp1")


def test_more_than_matrices_is_refused_by_name(folders: Callable[[str], Path], tmp_path: Path) -> None:
    split(folders("Phi-3") / "model", tmp_path / "tp1", Cut(1))
    with pytest.raises(ShardError, match=r"model\.layers\.0\.mlp has ffn_sub_norm\.weight; shards have none"):
        attach(bitnet(), tmp_path / "tp1")


def test_a_module_without_a_decoder_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    split(folders("Phi-3") / "model", tmp_path / "tp1", Cut(1))
    with pytest.raises(ShardError, match=r"Linear is no model of transformers: it has no get_decoder\(\)"):
        attach(nn.Linear(2, 2), tmp_path / "tp1")
    tower = CASES["GLM-4.5V"].make().model.visual
    with pytest.raises(ShardError, match=r"Glm4vMoeVisionModel: its get_decoder\(\) leads to .* no list `layers`"):
        attach(tower, tmp_path / "tp1")
