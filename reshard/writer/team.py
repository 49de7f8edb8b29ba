"""The processes that write one set together, as torchrun starts them: each its share of the ranks, the first one the
manifest.

They meet in torch.distributed's key-value store. It is asked again and again, never waited in, so that a signal is
heard. torchrun ends the others when a process has died.
"""

import contextlib
import os
import pickle
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from reshard.errors import GroupError, MissingDependencyError, UsageError

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
JOIN_SECONDS = 300.0  # within which the first process must open the store
WAIT_SECONDS = 1800.0  # for which a process waits for the others
_LEAVE_SECONDS = 5.0  # for which the process that holds the store waits for the others to have read it
_ASK_SECONDS = 0.1
_RESUME = "finished shards are kept: run the same command with --resume"


@dataclass(frozen=True)
class Place:
    """A process's number, how many there are, and how many of them run on its host."""

    number: int = 0
    size: int = 1
    on_this_host: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks and writes the manifest."""
        return self.number == 0


def read_place(environment: Mapping[str, str] = os.environ) -> Place:
    """What torchrun says in its variables; without all of them this process is alone. Raises UsageError."""
    if any(name not in environment for name in _VARIABLES):
        return Place()
    number, size, on_this_host = (environment.get(name, "1") for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    texts = (number, size, on_this_host)
    if not (all(re.fullmatch("[0-9]{1,9}", text) for text in texts) and int(number) < int(size)):
        raise UsageError(
            f"RANK={number} and WORLD_SIZE={size} are no place among processes; start with torchrun, or unset them to "
            "run alone"
        )
    return Place(int(number), int(size), max(1, int(on_this_host)))


def share(items: Sequence[T], place: Place) -> tuple[T, ...]:
    """A process's part: neighbours, since they read neighbouring bytes of a source. Sizes differ by one at most."""
    whole, over = divmod(len(items), place.size)
    start = place.number * whole + min(place.number, over)
    return tuple(items[start : start + whole + (place.number < over)])


class Team:
    """One process's part in a team; without a store it is alone."""

    def __init__(self, place: Place = Place(), store: Any = None) -> None:
        self.place = place
        self._store = store
        self.names = [f"process {number} of {place.size}" for number in range(place.size)]  # as messages call them
        self._gathered = 0

    def gather(self, value: T) -> list[T]:
        """Wait until every process has come here. Returns what each gave, by process.

        Raises GroupError where one has failed, or does not come.
        """
        if self._store is None:
            return [value]
        self._gathered += 1
        keys = [f"{self._gathered}/{number}" for number in range(self.place.size)]
        try:
            self._store.set(keys[self.place.number], pickle.dumps(value))
            deadline = time.monotonic() + WAIT_SECONDS
            while not self._store.check(keys):
                if self._store.check(["failed"]):
                    raise GroupError(self._store.get("failed").decode())
                if time.monotonic() > deadline:
                    absent = [name for name, key in zip(self.names, keys, strict=True) if not self._store.check([key])]
                    raise GroupError(
                        f"{', '.join(absent)} did not come within {WAIT_SECONDS:.0f} s; look at what it says last, and "
                        f"start all of them with torchrun, or unset RANK and WORLD_SIZE to run alone; {_RESUME}"
                    )
                time.sleep(_ASK_SECONDS)
            return [pickle.loads(self._store.get(key)) for key in keys]  # noqa: S301 (as torch.distributed does)
        except RuntimeError as error:
            raise GroupError(
                f"{self.names[0]}, or torchrun on its host, has ended or does not answer ({_first_line(error)}); "
                f"{_RESUME}"
            ) from error

    def meet(self) -> None:
        """Wait for all, and learn their hosts."""
        self.names = [
            f"{name} ({host})" for name, host in zip(self.names, self.gather(socket.gethostname()), strict=True)
        ]

    def leave(self, error: BaseException | None, is_holder: bool) -> None:
        """Tell the others of a failure. The process that holds the store stays until they have left."""
        left = [f"left/{number}" for number in range(self.place.size)]
        with contextlib.suppress(RuntimeError):
            if error is not None and not isinstance(error, GroupError) and not self._store.check(["failed"]):
                why = " ".join(str(error).split()) if isinstance(error, Exception) else "interrupted"
                name = self.names[self.place.number]
                self._store.set("failed", f"{name} has failed: {why or type(error).__name__}; {_RESUME}")
            self._store.set(left[self.place.number], "")
            deadline = time.monotonic() + _LEAVE_SECONDS
            while is_holder and not self._store.check(left) and time.monotonic() < deadline:
                time.sleep(_ASK_SECONDS)


@contextlib.contextmanager
def open_team(place: Place) -> Iterator[Team]:
    """The team at a place. Raises GroupError where the others do not come, MissingDependencyError without torch."""
    if place.size == 1:
        yield Team(place)
        return
    # torchrun's agent keeps a store of its own, also for the processes that it starts after others have died.
    is_holder = place.leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    team = Team(place, _open_store(place, is_holder))
    try:
        team.meet()
        yield team
    except BaseException as error:
        team.leave(error, is_holder)
        raise
    team.leave(None, is_holder)


def agree(team: Team, account: Mapping[str, str]) -> None:
    """Compare what each process has to say of its command and its source: names and values.

    Raises GroupError, on every process, where two differ.
    """
    accounts = team.gather(account)
    for number, other in enumerate(accounts):
        for what, value in accounts[0].items():
            if other[what] != value:
                raise GroupError(
                    f"{team.names[number]} has {what} {other[what]}, {team.names[0]} has {value}; give every process "
                    "the same command, and the same checkpoint on every host"
                )


def _open_store(place: Place, is_holder: bool) -> Any:
    try:
        import torch.distributed as dist
    except ImportError as error:
        raise MissingDependencyError(
            "work in several processes", "torch", error, "; or unset RANK and WORLD_SIZE to run alone"
        ) from error
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    answers: SimpleQueue[Any] = SimpleQueue()

    def connect() -> None:
        limit = timedelta(seconds=JOIN_SECONDS)
        try:
            answers.put(dist.TCPStore(host, int(port), None, is_holder, limit, wait_for_workers=False))
        except Exception as error:  # of a port out of range torch says TypeError
            answers.put(error)

    # Nothing interrupts torch.distributed while it waits: so this thread does not.
    threading.Thread(target=connect, name="reshard-connect", daemon=True).start()
    store, deadline = None, time.monotonic() + JOIN_SECONDS + _LEAVE_SECONDS
    while store is None and time.monotonic() < deadline:
        with contextlib.suppress(Empty):
            store = answers.get(timeout=_ASK_SECONDS)
    if store is None or isinstance(store, Exception):
        why = _first_line(store) if store else "no answer"
        raise GroupError(
            f"no meeting of the {place.size} processes at {host}:{port} within {JOIN_SECONDS:.0f} s ({why}); start "
            "them with torchrun, see to the network between the hosts, or unset RANK and WORLD_SIZE to run alone"
        )
    store.set_timeout(timedelta(seconds=60))
    return dist.PrefixStore(f"reshard/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
