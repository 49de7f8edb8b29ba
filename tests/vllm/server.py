"""A real OpenAI-compatible vLLM server in processes of its own, and requests to it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.vllm.models import attention_backend

START_SECONDS = 240
REQUEST_SECONDS = 60
END_SECONDS = 60
OPTION = "denseffn_tensor_parallel_size"


@dataclass(frozen=True)
class Answer:
    """A completion: its tokens, their log-probabilities, and the gap between the two likeliest at each place."""

    tokens: list[int]
    logprobs: list[float]
    gaps: list[float]


class Server:
    """A server that was started; `log` is what it printed."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self.process, self.port, self._log = process, port, log
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=REQUEST_SECONDS)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until_ready(self) -> None:
        """Raises TimeoutError, or AssertionError with the end of the log if it stops."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log[-6000:]}")
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/health").status_code == 200:
                    return
            time.sleep(0.25)  # between questions to another process
        raise TimeoutError(f"the server did not answer within {START_SECONDS} s:\n{self.log[-6000:]}")

    def wait_until_ended(self, seconds: float = END_SECONDS) -> int:
        """The exit code. Raises TimeoutError."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the server still runs after {seconds} s:\n{self.log[-6000:]}") from None

    def body(self, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        """A greedy completion of exactly `tokens` tokens."""
        return {
            "model": "m",
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 2,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }

    def complete(self, prompt: Sequence[int], tokens: int, rank: int | None = None) -> Answer:
        """`rank`: the data-parallel rank that answers."""
        headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
        response = self.client.post("/v1/completions", json=self.body(prompt, tokens), headers=headers)
        response.raise_for_status()
        return answer(response.json())

    def workers(self) -> list[int]:
        """Process ids of those that hold a model."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.getsid(int(path.name)) == self.process.pid and b"Worker" in (path / "comm").read_bytes():
                    found.append(int(path.name))
        return sorted(found)


def answer(document: dict[str, Any]) -> Answer:
    """Of a response's JSON."""
    choice = document["choices"][0]
    told = choice["logprobs"]
    tops = [sorted(top.values(), reverse=True) for top in told["top_logprobs"]]
    return Answer(choice["token_ids"], told["token_logprobs"], [top[0] - top[1] for top in tops])


def shard_options(shards: Path, data: int, extra: dict[str, Any] | None = None) -> list[str]:
    """What the plugin wants on a server's command line."""
    options = ["--load-format", "denseffn_shards"]
    options += ["--model-loader-extra-config", json.dumps({"shards": str(shards), **(extra or {})})]
    return options + (["--additional-config", json.dumps({OPTION: data})] if data > 1 else [])


@contextlib.contextmanager
def serving(
    folder: Path,
    model: Path,
    *,
    shards: Path | None = None,
    data: int = 1,
    tensor: int = 1,
    dtype: str = "float32",
    eager: bool = True,
    extra: dict[str, Any] | None = None,
    ready: bool = True,
    **environment: str,
) -> Iterator[Server]:
    """A server; its log goes to `folder`. All its processes are gone afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "m", "--port", str(port), "--host", "127.0.0.1", "--skip-tokenizer-init"]
    command += ["--dtype", dtype, "--max-model-len", "256", "--max-num-seqs", "32", "--data-parallel-size", str(data)]
    command += ["--tensor-parallel-size", str(tensor), *(["--enforce-eager"] if eager else [])]
    command += [] if attention_backend() is None else ["--attention-backend", str(attention_backend())]
    command += [] if shards is None else shard_options(shards, data, extra)
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_PLUGINS": "denseffn_shards", **environment}
    log = folder / f"server-{port}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, **environment}, start_new_session=True
        )
    server = Server(process, port, log)
    try:
        if ready:
            server.wait_until_ready()
        yield server
    finally:
        server.client.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
