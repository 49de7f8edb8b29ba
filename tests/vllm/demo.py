"""`make demo-vllm`: a real vLLM server of a small random DeepSeek model, unsplit and split over two ranks."""

import re
import shlex
import shutil
from pathlib import Path

from reshard.plan.pipeline import Cut
from tests.support.running import split
from tests.vllm import environment
from tests.vllm.models import write_model
from tests.vllm.server import Answer, Server, serving, shard_options

PROMPTS = ([17, 42, 99], [7, 311, 5, 250, 64, 128, 9, 33, 402])
TOKENS = 8
FOLDER = Path("demo-vllm")


def main() -> None:
    """Print what is asked and answered."""
    assert environment.INSTALLED
    shutil.rmtree(FOLDER, ignore_errors=True)
    model, shards = write_model(FOLDER / "model"), FOLDER / "tp2"
    _show("reshard", "split", str(model), str(shards), "--tp", "2")
    split(model, shards, Cut(2))
    serve = ["vllm", "serve", str(model), "--data-parallel-size", "2"]
    _show(*serve)
    with serving(FOLDER, model, data=2) as server:
        before = _ask(server)
    _show(*serve, *shard_options(shards, 2))
    with serving(FOLDER, model, shards=shards, data=2) as server:
        for line in sorted(re.findall(r"denseffn_shards: (rank .* bytes .*) in [0-9.]+ s", server.log)):
            print(f"denseffn_shards: {line}")
        after = _ask(server)
    same = [a.tokens for a in before] == [a.tokens for a in after]
    pairs = [pair for a, b in zip(before, after, strict=True) for pair in zip(a.logprobs, b.logprobs, strict=True)]
    apart = max(abs(x - y) for x, y in pairs)
    print(f"\ntokens {'equal' if same else 'differ'}; log-probabilities at most {apart:.0e} apart")
    if not same:
        raise SystemExit(3)


def _ask(server: Server) -> list[Answer]:
    answers = [server.complete(prompt, TOKENS, rank) for rank, prompt in enumerate(PROMPTS)]
    for rank, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        print(f"rank {rank}: {prompt} -> {answer.tokens}")
    return answers


def _show(*command: str) -> None:
    print(f"\n$ {shlex.join(command)}")


if __name__ == "__main__":
    main()
