"""Which signals end the program as a polite kill does: it unwinds, so that temporary files are removed."""

import signal
import sys
from types import FrameType

# All that end a process by default and may come from outside: schedulers send USR1, USR2 and XCPU before they kill.
# Not SIGQUIT: it asks for a core of the process as it is, at once; the next run removes what it leaves. Nor the faults
# (SEGV, BUS, …), after which no step is safe. Python has INT (KeyboardInterrupt), PIPE and XFSZ (OSError) itself.
ENDING = frozenset(
    {
        signal.SIGHUP,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGALRM,
        signal.SIGVTALRM,
        signal.SIGPROF,
        signal.SIGXCPU,
        signal.SIGIO,
        signal.SIGPWR,
        signal.SIGSTKFLT,
        *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
    }
)


def end_tidily() -> None:
    """For the whole process. A signal that is ignored (nohup's HUP), or has a handler, keeps that."""
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # XCPU comes every second: it must not interrupt the tidying
    sys.exit(128 + number)
