"""What else one could do with the same weights: `python -m benchmarks.peers NAME SRC OUT TP`.

Prints the seconds of the work itself, imports left out: in favour of the peers.
"""

import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

STAGE = 1 << 20
THREADS = 4


def _cuts(intermediate_size: int, tp_size: int) -> Iterator[tuple[int, int, int]]:
    share = intermediate_size // tp_size
    for rank in range(tp_size):
        yield rank, rank * share, (rank + 1) * share


def get_slice(source: Path, out: Path, tp_size: int) -> None:
    """Each rank in turn: safetensors' slices of the open file, saved."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, framework="pt") as opened:
        names = sorted(opened.keys())
        gates = [name for name in names if ".gate_proj." in name]
        size = opened.get_slice(gates[0]).get_shape()[0]
        for rank, start, stop in _cuts(size, tp_size):
            tensors = {}
            for gate in gates:
                up, down = gate.replace("gate_proj", "up_proj"), gate.replace("gate_proj", "down_proj")
                halves = [opened.get_slice(name)[start:stop] for name in (gate, up)]
                tensors[gate.replace("gate_proj", "gate_up_proj")] = torch.cat(halves)
                tensors[down] = opened.get_slice(down)[:, start:stop].contiguous()
            save_file(tensors, out / f"rank-{rank}.safetensors")


def narrow(source: Path, out: Path, tp_size: int) -> None:
    """Whole tensors, narrowed for every rank, collected, saved at the end."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(tp_size)]
    with safe_open(source, framework="pt") as opened:
        for gate in [name for name in sorted(opened.keys()) if ".gate_proj." in name]:
            down = gate.replace("gate_proj", "down_proj")
            whole = [opened.get_tensor(name) for name in (gate, gate.replace("gate_proj", "up_proj"))]
            whole_down = opened.get_tensor(down)
            for rank, start, stop in _cuts(whole[0].shape[0], tp_size):
                halves = [tensor.narrow(0, start, stop - start) for tensor in whole]
                shards[rank][gate.replace("gate_proj", "gate_up_proj")] = torch.cat(halves)
                shards[rank][down] = whole_down.narrow(1, start, stop - start).contiguous()
    for rank, tensors in enumerate(shards):
        save_file(tensors, out / f"rank-{rank}.safetensors")


def _limit(*, direct: bool, copy: bool = False) -> Callable[[Path, Path, int], None]:
    def write(source: Path, out: Path, tp_size: int) -> None:
        """As many bytes, fsynced, from memory or the source: no cutting or hashing."""
        blocks = source.stat().st_size // tp_size // STAGE
        ranks = list(range(tp_size))

        def work() -> None:
            memory = mmap.mmap(-1, STAGE)
            memory.write(os.urandom(STAGE))
            while ranks:
                try:
                    rank = ranks.pop()
                except IndexError:
                    return
                flags = os.O_CREAT | os.O_WRONLY | (os.O_DIRECT if direct else 0)
                descriptor = os.open(out / f"rank-{rank}", flags)
                with source.open("rb", buffering=0) as opened:
                    for block in range(blocks):
                        if copy:
                            os.preadv(opened.fileno(), [memory], (rank * blocks + block) * STAGE)
                        os.pwrite(descriptor, memory, block * STAGE)
                os.fsync(descriptor)
                os.close(descriptor)

        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return write


PEERS: dict[str, Callable[[Path, Path, int], None]] = {
    "get_slice": get_slice,
    "narrow": narrow,
    "write_buffered": _limit(direct=False),
    "write_direct": _limit(direct=True),
    "copy_direct": _limit(direct=True, copy=True),
}


def main() -> None:
    """Run one peer."""
    name, source, out, tp_size = sys.argv[1:]
    if name in {"get_slice", "narrow"}:
        import safetensors.torch
        import torch

        del safetensors, torch
    Path(out).mkdir()
    start = time.perf_counter()
    PEERS[name](next(Path(source).glob("*.safetensors")), Path(out), int(tp_size))
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
