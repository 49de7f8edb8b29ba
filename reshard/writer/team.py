"""The processes that write one set together: each its share of the ranks, the first one the manifest.

`Alone` is the usual case; reshard.writer.gloo has the other one.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from reshard.errors import GroupError, UsageError

T = TypeVar("T")
Tick = Callable[[int], None]

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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
    if not (number.isdecimal() and size.isdecimal() and on_this_host.isdecimal() and int(number) < int(size)):
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


class Team(Protocol):
    """Processes that do the same thing at the same time, each with its part.

    What one of them raises is told to the others: they get a GroupError at their next call. `show` is called with
    the bytes that all have done.
    """

    show: Tick

    @property
    def place(self) -> Place:
        """Where this process stands."""

    def exchange(self, value: T) -> list[T]:
        """Wait until every process has come here. Returns what each gave, by process."""

    def tick(self, nbytes: int) -> None:
        """Say that so many bytes were done. From any thread."""

    def name(self, number: int) -> str:
        """How messages call a process."""


class Alone:
    """A team of one."""

    place = Place()

    def __init__(self, show: Tick = lambda n: None) -> None:
        self.show = show

    def tick(self, nbytes: int) -> None:
        """Show them."""
        self.show(nbytes)

    def exchange(self, value: T) -> list[T]:
        """Nobody is waited for."""
        return [value]

    def name(self, number: int) -> str:
        """There is only this one."""
        return f"process {number}"


def agree(team: Team, account: Mapping[str, str]) -> None:
    """Compare what each process has to say of its command and its source: names and values.

    Raises GroupError, on every process, where two differ.
    """
    accounts = team.exchange(account)
    for number, other in enumerate(accounts):
        for what, value in accounts[0].items():
            if other[what] != value:
                raise GroupError(
                    f"{team.name(number)} has {what} {other[what]}, {team.name(0)} has {value}; give every process the "
                    "same command, and the same checkpoint on every host"
                )
