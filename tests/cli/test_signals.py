"""Which signals end the program tidily: what each of them does to a process, asked of the kernel itself."""

import json
import signal
import subprocess
import sys

from tests.support.running import TIMEOUT_SECONDS

_SCRIPT = """
import json, os, signal, sys
from reshard.cli.signals import end_tidily

def ended(before, number):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 0
        try:
            before()
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # as XCPU comes again
        except SystemExit as end:
            os.kill(os.getpid(), number)
            code = end.code
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    end_tidily()

# What stops a process, and what is Python's KeyboardInterrupt.
others = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGINT}
wanted = sorted(signal.valid_signals() - others)
print(json.dumps({
    "plain": {n: ended(lambda: None, n) for n in wanted},
    "tidy": {n: ended(end_tidily, n) for n in wanted},
    "ignored": ended(ignored, signal.SIGHUP),
}))
"""

# Whoever sends these wants the process as it is, or gone.
_NOT_TIDIED = {
    signal.SIGKILL,
    signal.SIGQUIT,
    signal.SIGILL,
    signal.SIGTRAP,
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGSEGV,
    signal.SIGSYS,
}


def test_each_that_ends_a_process_ends_it_tidily() -> None:
    script = f"import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n{_SCRIPT}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=TIMEOUT_SECONDS, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    ends = {int(number) for number, code in found["plain"].items() if code == -int(number)}
    assert ends >= _NOT_TIDIED
    assert ends >= {signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM, signal.SIGXCPU, signal.SIGRTMIN}
    expected = {number: -number if number in _NOT_TIDIED else 128 + number for number in ends}
    assert {number: found["tidy"][str(number)] for number in ends} == expected
    assert found["ignored"] == 0, "nohup's HUP stays ignored"
