"""What the pages show of commands, and what these print."""

import re

from tests.support.running import Done


def commands_of(text: str, prompt: str = r"^\$ ") -> list[tuple[str, str]]:
    """The (command, output) pairs of a console block."""
    pairs = (part.partition("\n") for part in re.split(prompt, text, flags=re.MULTILINE)[1:])
    return [(command, output) for command, _, output in pairs]


def check_output(done: Done, output: str) -> None:
    """That a command printed what a page shows, but for a rounding that depends on the processor."""
    printed = "\n".join(line.rstrip() for line in (done.out + done.err).splitlines())
    assert _steady(printed) == _steady(output.rstrip())


def _steady(text: str) -> str:
    return re.sub(r"differ by \S+ of|error \S+,", "…", text)
