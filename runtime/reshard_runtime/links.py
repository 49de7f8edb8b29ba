"""Connections between the ranks of a group that all run on one host.

What they exchange goes straight from one to the other, in the caller's own thread. gloo's threads of its own must be
woken for every message, on both sides: on a busy host that takes longer than the bytes and the products.
"""

import contextlib
import select
import shutil
import socket
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from reshard.errors import GroupError

_HEAD = 8  # bytes ahead of each message, which say how long its body is
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # tells hosts apart
_connected: weakref.WeakKeyDictionary[dist.ProcessGroup, "Links | None"] = weakref.WeakKeyDictionary()


def links_of(group: dist.ProcessGroup) -> "Links | None":
    """The group's connections, made once; None where not all of its ranks reach each other on one host. Collective."""
    if group not in _connected:
        _connected[group] = _connect(group)
    return _connected[group]


class Links:
    """Connections to the group's other ranks, by rank; at its own place None. They end with the object."""

    def __init__(self, connections: Sequence[socket.socket | None], seconds: float) -> None:
        """seconds: how long a rank waits for another's next bytes."""
        self._connections, self._seconds, self._in_step = connections, seconds, True
        for connection in connections:
            if connection is not None:
                connection.setblocking(False)

    def exchange(self, head: bytes, bodies: Sequence[memoryview], rooms: Sequence[memoryview]) -> list[bytes]:
        """Sends every other rank r `head`, which is of the same length everywhere, and bodies[r]; the heads, by rank.

        What rank r sends goes to rooms[r], of its length; where another length comes, it goes nowhere.

        Raises GroupError where a rank is gone, or sends nothing for too long, and ever after.
        """
        if not self._in_step:
            raise GroupError(
                "the group's last exchange was broken off, and its ranks are out of step; start them again"
            )
        self._in_step = False
        transfers = {
            connection.fileno(): _Transfer(rank, connection, head, bodies[rank], rooms[rank])
            for rank, connection in enumerate(self._connections)
            if connection is not None
        }
        waiting = {number: transfer for number, transfer in transfers.items() if not transfer.advance()}
        poll = select.poll()
        for number, transfer in waiting.items():
            poll.register(number, transfer.events)
        while waiting:
            ready = poll.poll(self._seconds * 1000)
            if not ready:
                late = ", ".join(str(transfer.rank) for transfer in waiting.values())
                raise GroupError(f"rank {late} of the group sent nothing for {self._seconds:g} s")
            for number, _ in ready:
                if waiting[number].advance():
                    poll.unregister(number)
                    del waiting[number]
                else:
                    poll.modify(number, waiting[number].events)
        self._in_step = True
        heads = {transfer.rank: transfer.head for transfer in transfers.values()}
        return [heads.get(rank, head) for rank in range(len(self._connections))]


class _Transfer:
    """One exchange with one rank: bytes to send, and to receive: how long the body is, the head, the body."""

    def __init__(self, rank: int, connection: socket.socket, head: bytes, body: memoryview, room: memoryview) -> None:
        self.rank, self._connection, self._room = rank, connection, room
        self._to_send = [memoryview(len(body).to_bytes(_HEAD, "little") + head), body]
        self._first = bytearray(_HEAD + len(head))
        self._to_fill = memoryview(self._first)
        self._in_body = False

    @property
    def head(self) -> bytes:
        return bytes(self._first[_HEAD:])

    @property
    def events(self) -> int:
        """What is waited for."""
        return (select.POLLOUT if self._to_send else 0) | (0 if self._received else select.POLLIN)

    @property
    def _received(self) -> bool:
        return self._in_body and not self._to_fill

    def advance(self) -> bool:
        """Send and receive what can be without waiting. Whether all is done."""
        try:
            with contextlib.suppress(BlockingIOError):
                self._send()
            with contextlib.suppress(BlockingIOError):
                self._receive()
        except OSError as error:
            raise GroupError(f"rank {self.rank} of the group is gone: {error}") from error
        return not self._to_send and self._received

    def _send(self) -> None:
        while self._to_send:
            sent = self._connection.sendmsg(self._to_send)
            while self._to_send and sent >= len(self._to_send[0]):
                sent -= len(self._to_send.pop(0))
            if self._to_send:
                self._to_send[0] = self._to_send[0][sent:]

    def _receive(self) -> None:
        while not self._received:
            if self._to_fill:
                count = self._connection.recv_into(self._to_fill)
                if count == 0:
                    raise GroupError(f"rank {self.rank} of the group is gone: it closed its connection")
                self._to_fill = self._to_fill[count:]
            elif not self._in_body:
                length, self._in_body = int.from_bytes(self._first[:_HEAD], "little"), True
                self._to_fill = self._room if length == len(self._room) else memoryview(bytearray(length))


def _connect(group: dist.ProcessGroup) -> Links | None:
    rank, size = group.rank(), group.size()
    connections: list[socket.socket | None] = [None] * size
    folder, listener, own = None, None, None
    with contextlib.suppress(OSError, AttributeError):  # a path that is too long, a system without such sockets
        folder = tempfile.mkdtemp(prefix="reshard-")  # this user's alone
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{folder}/{rank}")
        listener.listen(size)
        own = (_BOOT.read_text(), f"{folder}/{rank}")
    try:
        addresses = _told(group, own)
        reached = all(address is not None and own is not None and address[0] == own[0] for address in addresses)
        agreed = all(_told(group, reached and _reach(addresses[:rank], connections, rank)))
        if listener is None or not agreed:
            return None
        for _ in range(rank + 1, size):  # all of them wait there already
            connection, _ = listener.accept()
            connections[int.from_bytes(connection.recv(_HEAD, socket.MSG_WAITALL), "little")] = connection
        return Links(connections, _patience(group))
    finally:
        if listener is not None:
            listener.close()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _reach(addresses: Sequence[Any], connections: list[socket.socket | None], rank: int) -> bool:
    """Connects to the ranks before this one."""
    try:
        for other, (_, path) in enumerate(addresses):
            connection = connections[other] = socket.socket(socket.AF_UNIX)
            connection.connect(path)
            connection.sendall(rank.to_bytes(_HEAD, "little"))
    except OSError:
        return False
    return True


def _told(group: dist.ProcessGroup, own: object) -> list[Any]:
    """What every rank says, by rank."""
    said: list[Any] = [None] * group.size()
    dist.all_gather_object(said, own, group=group)
    return said


def _patience(group: dist.ProcessGroup) -> float:
    """Seconds of the group's own time-out, which torch shows its backend only."""
    try:
        timeout = group._get_backend(torch.device("cpu")).options._timeout
    except (AttributeError, RuntimeError):
        timeout = dist.constants.default_pg_timeout
    return float(timeout.total_seconds())
