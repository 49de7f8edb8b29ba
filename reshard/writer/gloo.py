"""A team over torch.distributed, as torchrun starts it.

A thread of each process takes part in a small all_gather several times a second, for as long as the team lives: it
carries how far each one is, what it exchanges, and whether it has failed. So a process that fails, dies or stops
answering is known to the others at once, whatever they are doing, and nobody waits for it. Every process sees the same
gathered rows, so all decide alike.
"""

import contextlib
import os
import secrets
import socket
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

from reshard.errors import GroupError, MissingDependencyError
from reshard.writer.team import Place, Tick

try:
    import torch
    import torch.distributed as dist
except ImportError as error:
    raise MissingDependencyError(
        "several processes work together through torch.distributed, and torch is not installed: "
        "pip install 'reshard[runtime]'; or unset RANK and WORLD_SIZE to run alone"
    ) from error

T = TypeVar("T")

JOIN_SECONDS = 300.0  # within which all processes must have come
ANSWER_SECONDS = 60.0  # within which a process that lives takes part in a round
STALLED_SECONDS = 600.0  # after which a process that neither reads nor writes a byte is given up
ROUND_SECONDS = 0.1
_SURVIVOR_SECONDS = 1.5
_WORKS, _FAILED, _GONE = range(3)
_RESUME = "shards that were finished are kept: run the same command with --resume"


class GlooTeam:
    """One process's part in a team. Raises GroupError where the others do not come."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.show: Tick = lambda nbytes: None
        self._names = [f"process {number}" for number in range(place.size)]
        self._changed = threading.Condition()
        self._wake = threading.Event()
        self._state = _WORKS
        self._posted: Any = None  # what is exchanged, or why this process has failed
        self._sent = self._received = 0  # exchanges begun here, exchanges that all have made
        self._values: list[Any] = []
        self._nbytes = 0
        self._shown = 0
        self._over: str | None = None  # why the team is no more; empty where it ended well
        self._moved = [(-1, -1, 0.0)] * place.size
        self._thread = threading.Thread(target=self._pulse, name="reshard-team", daemon=True)
        self._thread.start()
        hosts = self.exchange(socket.gethostname())
        self._names = [f"process {number} of {place.size} ({host})" for number, host in enumerate(hosts)]

    def name(self, number: int) -> str:
        """Its number and host."""
        return self._names[number]

    def exchange(self, value: T) -> list[T]:
        """Wait until every process has come here. Returns what each gave, by process."""
        with self._changed:
            self._posted, self._sent = value, self._sent + 1
            self._wake.set()
            self._changed.wait_for(lambda: self._received == self._sent or self._over is not None)
            if self._received < self._sent:
                raise GroupError(str(self._over))
            return self._values

    def tick(self, nbytes: int) -> None:
        """Count bytes. Raises GroupError when the team is no more."""
        if self._over is not None:
            raise GroupError(self._over)
        with self._changed:
            self._nbytes += nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.exchange(None)  # nobody closes its connections while another still reads from them
            self._end(_GONE)
        elif self._over is None and isinstance(error, Exception):
            self._end(_FAILED, " ".join(str(error).split()) or type(error).__name__)
        else:
            self._end(_GONE)
            if isinstance(error, SystemExit) and self._over:
                # torchrun ends the others when one has died: say which.
                raise GroupError(self._over) from None
        if not self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()

    def _join(self) -> Any:
        """Meet the others. Returns the store through which they met."""
        limit = timedelta(seconds=JOIN_SECONDS)
        try:
            store, number, size = next(dist.rendezvous("env://", self.place.number, self.place.size, timeout=limit))
            store = meet(store, self.place)
            dist.init_process_group(
                "gloo", store=store, rank=number, world_size=size, timeout=timedelta(seconds=ANSWER_SECONDS)
            )
        except (RuntimeError, ValueError, OSError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            within = f" within {JOIN_SECONDS:.0f} s" if "imed out" in str(error) else ""
            raise GroupError(
                f"the {self.place.size} processes did not all meet at {address}{within} ({_first_line(error)}); start "
                "them with torchrun, see to the network between the hosts (GLOO_SOCKET_IFNAME names its interface), or "
                "unset RANK and WORLD_SIZE to run alone"
            ) from error
        return store

    def _end(self, state: int, why: str | None = None) -> None:
        """Let the others know, and wait a little for the thread's end."""
        with self._changed:
            self._state, self._posted = state, why
        self._wake.set()
        self._thread.join(ANSWER_SECONDS if state == _FAILED else 2 * _SURVIVOR_SECONDS)

    # --- the thread ---

    def _pulse(self) -> None:
        over = None
        try:
            store = self._join()  # in this thread, since nothing interrupts torch.distributed while it waits
            try:
                while over is None:
                    self._wake.wait(ROUND_SECONDS)
                    over = self._round()
            except Exception as error:
                over = self._lost(store, error)
        except GroupError as error:
            over = str(error)
        with self._changed:
            self._over = over
            self._changed.notify_all()

    def _round(self) -> str | None:
        """One all_gather. Returns why it was the last one, if it was."""
        with self._changed:
            self._wake.clear()
            mine = [self._state, self._sent, self._nbytes, self._stalled() if self.place.leads else -1]
            posted = self._posted
        rows = [torch.zeros(len(mine), dtype=torch.int64) for _ in range(self.place.size)]
        dist.all_gather(rows, torch.tensor(mine, dtype=torch.int64))
        states, sent, nbytes, stalled = zip(*(row.tolist() for row in rows), strict=True)
        self._moved = [
            (s, n, time.monotonic()) if moved[:2] != (s, n) or s > self._received else moved
            for moved, s, n in zip(self._moved, sent, nbytes, strict=True)
        ]
        if sum(nbytes) > self._shown:
            with contextlib.suppress(OSError, ValueError):  # a stderr that is closed fails no split
                self.show(sum(nbytes) - self._shown)
            self._shown = sum(nbytes)
        if _FAILED in states:
            return self._told(_gather(posted if mine[0] == _FAILED else None))
        if _GONE in states:
            return "" if mine[0] == _GONE else f"{self._names[states.index(_GONE)]} was interrupted; {_RESUME}"
        if stalled[0] >= 0:
            return (
                f"{self._names[stalled[0]]} has read and written nothing for {STALLED_SECONDS:.0f} s; see to its "
                f"source and its disk; {_RESUME}"
            )
        if min(sent) > self._received:
            values = _gather(posted)
            with self._changed:
                self._values, self._received = values, self._received + 1
                self._changed.notify_all()
        return None

    def _stalled(self) -> int:
        """The process that all others wait for and that does not move, -1 if there is none."""
        now = time.monotonic()
        for number, (_, _, since) in enumerate(self._moved):
            if since and now - since > STALLED_SECONDS:
                return number
        return -1

    def _told(self, failures: list[str | None]) -> str:
        number, why = next((number, why) for number, why in enumerate(failures) if why is not None)
        return f"{self._names[number]} has failed: {why}"

    def _lost(self, store: Any, error: Exception) -> str:
        """The group is broken. Who lives says so in the store; the one that does not is to blame."""
        silent = f"within {ANSWER_SECONDS:.0f} s" if "imed out" in str(error) else "any more"
        living: set[int] = set()
        deadline = time.monotonic() + _SURVIVOR_SECONDS
        with contextlib.suppress(RuntimeError):  # where the store is gone too, nobody can be named
            store.set(f"lives/{self.place.number}", "")
            while len(living) < self.place.size and time.monotonic() < deadline:
                living |= {n for n in range(self.place.size) if store.check([f"lives/{n}"])}
                time.sleep(ROUND_SECONDS)
        missing = [name for number, name in enumerate(self._names) if living and number not in living]
        who = " and ".join(missing) or "another process"
        return f"{who} has died or does not answer {silent} ({_first_line(error)}); {_RESUME}"


def meet(store: Any, place: Place) -> Any:
    """Wait until every process has come. Returns the meeting's own part of the store; raises TimeoutError.

    torchrun keeps the store when it starts the processes anew, so what an earlier meeting left must count for nothing:
    the first process opens a new one, and closes it with the marks of all who have come.
    """
    mine, deadline = secrets.token_hex(8), time.monotonic() + JOIN_SECONDS
    marks = [f"mark/{number}" for number in range(place.size)]
    meeting = store.add("reshard/meetings", int(place.leads))
    while True:
        here = dist.PrefixStore(f"reshard/{meeting}", store)
        here.set(marks[place.number], mine)
        if place.leads and here.check(marks):
            here.set("all", b" ".join(map(here.get, marks)))
        if here.check(["all"]) and mine.encode() in here.get("all").split():
            return here
        if time.monotonic() > deadline:
            absent = [number for number, mark in enumerate(marks) if not here.check([mark])]
            raise TimeoutError(f"timed out waiting for process {', '.join(map(str, absent or [0]))}")
        time.sleep(ROUND_SECONDS)
        if not place.leads:
            meeting = store.add("reshard/meetings", 0)


def _gather(value: Any) -> list[Any]:
    """What each process gives, by process."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
