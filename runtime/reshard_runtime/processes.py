"""Ranks as processes of this host, for this package's own programs, each with the command line's error boundary."""

import contextlib
import logging
import multiprocessing
import socket
from collections.abc import Callable, Iterator
from typing import Any

import torch
import typer

from reshard.cli.output import Output, run
from reshard.cli.signals import end_tidily
from reshard.errors import GroupError


def program(main: Callable[..., None]) -> None:
    """What `python -m` runs of a module: told to end by a signal, it removes its temporary files first."""
    end_tidily()
    run(lambda: typer.run(main))


def spawn(work: Callable[..., None], size: int, *arguments: Any) -> None:
    """Call work(rank, *arguments) in `size` processes; where one fails, which says why itself, the others are ended.

    Raises typer.Exit with its code, GroupError where it was killed.
    """
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # that it ends the others is no news
    try:
        torch.multiprocessing.spawn(_rank, (work, arguments), size)
    except torch.multiprocessing.ProcessExitedException as error:
        if error.signal_name is None:
            raise typer.Exit(error.exit_code) from None
        raise GroupError(
            f"process {error.error_index} of {size} was ended by {error.signal_name}; look for what sent it, such as "
            "the system where memory ran out"
        ) from None
    except (KeyboardInterrupt, SystemExit):  # told to end, which the ranks need not have been
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()
        raise


def _rank(rank: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    run(lambda: work(rank, *arguments))


@contextlib.contextmanager
def rank_output(rank: int, size: int, debug: bool) -> Iterator[Output]:
    """What one of several processes prints with; its errors end here, and say whose they are."""
    output = Output("human", quiet=True, debug=debug)
    output.is_process(rank, size, socket.gethostname())
    with output.errors():
        yield output
