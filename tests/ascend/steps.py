"""What the option's tests run in each process of vllm-ascend. Each function takes the group first."""

import functools
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.ascend import inside
from tests.ascend.inside import Served
from tests.vllm.inside import tokens

BUCKETS = (1, 2, 4, 8, 16, 24)  # graphs' sizes: a step's tokens are padded to one


def sizes(group: dist.ProcessGroup, served: Served) -> dict[str, Any]:
    """Of the model's linears, what they are built for; of vllm-ascend's own MLP group, whether there is one."""
    _, model = inside.loaded(served)
    from vllm.model_executor.layers.linear import LinearBase
    from vllm_ascend.distributed import parallel_state

    linears = {name: module for name, module in model.named_modules() if isinstance(module, LinearBase)}
    return {
        "mlp group": parallel_state._MLP_TP,
        "sizes": {name: (linear.tp_rank, linear.tp_size) for name, linear in linears.items()},
        "ways": {name: type(getattr(linear, "custom_op", None)).__name__ for name, linear in linears.items()},
    }


@contextmanager
def _sent() -> Iterator[list[tuple[int, int]]]:
    """(rows, bytes) of each tensor that is gathered."""
    from reshard_runtime.collectives import LinkedCollectives

    sent: list[tuple[int, int]] = []
    gather = LinkedCollectives.gather

    @functools.wraps(gather)
    def watch(self: LinkedCollectives, rows: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        sent.append((len(rows), rows.nbytes))
        return gather(self, rows, *more, **named)

    with mock.patch.object(LinkedCollectives, "gather", watch):
        yield sent


@contextmanager
def _met() -> Iterator[list[tuple[Any, ...]]]:
    """(collective, the tensors that it read and wrote): kept alive, so that no later one gets an address of theirs."""
    from reshard_runtime.serving.vllm.groups import Group

    met: list[tuple[Any, ...]] = []
    meet = Group.meet

    def watch(group: Any, collective: Any, *given: Any) -> torch.Tensor:
        met.append((collective.__name__, *(each for each in given if isinstance(each, torch.Tensor))))
        return meet(group, collective, *given)

    with mock.patch.object(Group, "meet", watch):
        yield met


def travel(group: dist.ProcessGroup, served: Served, counts: list[int]) -> dict[str, Any]:
    """Layer by layer: how tokens travelled, the bytes of a row, the result, and that of gathering them as they are."""
    config, model = inside.loaded(served)
    from reshard_runtime.serving.vllm.model_layers import dense_mlps
    from reshard_runtime.serving.vllm.token_codec import passthrough

    rank = inside.data_parallel_rank(config)
    x = tokens(rank, counts[rank], config.model_config.hf_config.hidden_size, config.model_config.dtype)
    found = []
    with inside.forward_context(config, model, counts):
        for mlp in dense_mlps(model).values():
            with _sent() as sent:
                result = mlp(x).clone()
            ((rows, nbytes),) = sent
            way = mlp.codec.name
            mlp.codec = passthrough(mlp.gate_up_proj)
            found.append({"way": way, "row": nbytes / rows, "result": result, "as they are": mlp(x).clone()})
    return {"layers": found, "hidden": x.shape[1]}


def decode(group: dist.ProcessGroup, served: Served, steps: int, most: int) -> dict[str, Any]:
    """`steps` decode steps of 0, 1, 7 and `most` tokens in an order that is this rank's own, in its own graph buckets.

    Results by bucket, all of a bucket's must be equal; the sizes of every gather; the addresses that collectives met.
    """
    config, model = inside.loaded(served)
    from reshard_runtime.serving.vllm.model_layers import dense_mlps

    rank = inside.data_parallel_rank(config)
    hidden, dtype = config.model_config.hf_config.hidden_size, config.model_config.dtype
    numbers = random.Random(rank)
    results: dict[int, list[torch.Tensor]] = {}
    different = []
    with _sent() as sent, _met() as met:
        for step in range(steps):
            count = numbers.choice((0, 1, 7, most))
            bucket = numbers.choice([size for size in BUCKETS if size >= count]) if count else 0
            x = tokens(rank, most, hidden, dtype)[:bucket]
            with inside.forward_context(config, model, [bucket] * config.parallel_config.data_parallel_size):
                found = [mlp(x).clone() for mlp in dense_mlps(model).values()]
            if any(not torch.equal(a, b) for a, b in zip(found, results.setdefault(bucket, found), strict=True)):
                different.append((step, bucket))
    addresses = {(name, *(tensor.data_ptr() for tensor in tensors)) for name, *tensors in met if tensors}
    return {"results": results, "different": different, "sent": set(sent), "addresses": addresses}


def load_each(group: dist.ProcessGroup, served: list[Served]) -> str:
    """Load what is meant for this process; what was raised."""
    return inside.load(group, served[dist.get_rank()])


def rehearse(group: dist.ProcessGroup, served: Served, count: int) -> tuple[list[torch.Tensor], set[tuple[int, int]]]:
    """The dense MLPs' results of `count` tokens on every rank in a step without requests, and what was gathered."""
    config, model = inside.loaded(served)
    from reshard_runtime.serving.vllm.model_layers import dense_mlps

    x = tokens(inside.data_parallel_rank(config), count, config.model_config.hf_config.hidden_size, torch.bfloat16)
    with _sent() as sent, inside.forward_context(config, model, [count] * 4, requests=False):
        return [mlp(x).clone() for mlp in dense_mlps(model).values()], set(sent)


def too_many(group: dist.ProcessGroup, served: Served, wrong: int, count: int, said: Path) -> None:
    """Rank `wrong` has `count` tokens, more than the fixed rows, says what it is told in the file `said`, and ends.

    As an engine's process does whose model raises. The others raise what they are told.
    """
    config, model = inside.loaded(served)
    rank = inside.data_parallel_rank(config)
    own = count if rank == wrong else 1
    x = tokens(rank, own, config.model_config.hf_config.hidden_size, config.model_config.dtype)
    with inside.forward_context(config, model, [own] * config.parallel_config.data_parallel_size):
        try:
            model.model.layers[0].mlp(x)
        except Exception as error:
            if rank == wrong:
                said.write_text(f"{type(error).__name__}: {error}")
                os._exit(1)
            raise


def on_meta(group: dist.ProcessGroup, served: Served, counts: list[int]) -> list[str]:
    """A dense layer's forward on the meta device, by the kernels' shape functions: a tensor there has no values.

    What asks for one (`.item()`, `.tolist()`, `.cpu()`, a shape that depends on data) raises. Collectives give results
    of their shapes. What the forward says of each dense layer.
    """
    config, model = inside.loaded(served)
    from reshard_runtime.serving.vllm import split_mlp
    from reshard_runtime.serving.vllm.model_layers import dense_mlps

    class Collectives:
        in_float32 = False

        def __init__(self, group: Any) -> None:
            self.size = group.size()

        def gather(self, rows: torch.Tensor, out: torch.Tensor | None, counts: Sequence[int]) -> torch.Tensor:
            return self._result(rows, len(rows) * self.size, out)

        def reduce_scatter(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            return self._result(rows, len(rows) // self.size, out)

        def _result(self, rows: torch.Tensor, count: int, out: torch.Tensor | None) -> torch.Tensor:
            result = rows.new_empty(count, rows.shape[1])
            assert out is None or (out.shape, out.dtype) == (result.shape, result.dtype)
            return result if out is None else out

        def all_reduce(self, rows: torch.Tensor) -> torch.Tensor:
            return rows

    class Kernels:
        collectives = Collectives

    own = counts[inside.data_parallel_rank(config)]
    hidden, dtype = config.model_config.hf_config.hidden_size, config.model_config.dtype
    said = []
    with mock.patch.object(split_mlp, "kernels_for", return_value=Kernels()):
        for mlp in dense_mlps(model).values():
            for module in mlp.modules():
                for name, value in {**module._parameters, **vars(module)}.items():
                    if isinstance(value, torch.nn.Parameter):
                        module._parameters[name] = torch.nn.Parameter(value.to("meta"), requires_grad=False)
                    elif isinstance(value, torch.Tensor):
                        setattr(module, name, value.to("meta"))
            x = torch.empty(own, hidden, dtype=dtype, device="meta")
            with inside.forward_context(config, model, counts):
                result = mlp.run(x)
            said.append(f"{result.device} {list(result.shape)}")
            for ask in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu):  # that the check can fail
                try:
                    ask(result)
                    said.append(f"{ask.__name__} was answered")
                except (RuntimeError, NotImplementedError):
                    pass
    return said
