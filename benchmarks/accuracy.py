"""`make bench`: how far split BF16 layers are from float64, relative to the unsplit layer of Hugging Face transformers.

Root mean square over all outputs, of gloo groups of R processes, by the type in which partial sums travel and how they
are added: pairwise (every rank adds what it received in float32; the CPU backend), or by the collective in the type
that travels (what nccl and hccl do; here gloo's).
"""

import argparse

import torch

from reshard_runtime import DenseFFN
from tests.support.distributed import Ranks
from tests.support.unsplit import error, part, split_outputs, unsplit_mlp

HIDDEN, INTERMEDIATE, TOKENS = 1024, 4096, 256
WAYS: dict[str, tuple[bool, torch.dtype]] = {
    "pairwise, BF16": (True, torch.bfloat16),
    "pairwise, FP32": (True, torch.float32),
    "collective, BF16": (False, torch.bfloat16),
    "collective, FP32": (False, torch.float32),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    arguments = parser.parse_args()
    mlp = unsplit_mlp(HIDDEN, INTERMEDIATE, torch.bfloat16)
    tokens = torch.randn(TOKENS, HIDDEN).bfloat16()
    reference = unsplit_mlp(HIDDEN, INTERMEDIATE, torch.bfloat16).double()(tokens.double())
    own = error(mlp(tokens), reference)
    print(f"BF16, H {HIDDEN}, I {INTERMEDIATE}, {TOKENS} tokens: error relative to transformers' unsplit BF16 layer's")
    print(f"{'R':>4}", *(f"{name:>18}" for name in WAYS))
    for size in arguments.ranks:
        ranks = Ranks(size)
        try:
            outputs = ranks.run(split_outputs, mlp.state_dict(), tokens, WAYS)
        finally:
            ranks.stop()
        errors = (error(torch.cat([output[name] for output in outputs]), reference) / own for name in WAYS)
        print(f"{size:4}", *(f"{value:18.2f}" for value in errors))
    alone = DenseFFN(part(mlp.state_dict(), 0, 1))(tokens)
    print(f"   1 {error(alone, reference) / own:18.2f}")


if __name__ == "__main__":
    main()
