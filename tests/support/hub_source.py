"""A hub's repository as a source, read by the real client."""

from functools import partial

from reshard.source.hub import find_repository
from reshard.source.range_cache import StagedSource
from reshard.source.retry import RetryPolicy
from tests.support.hub_server import REPO, Hub


class Waits(list[float]):
    """In the place of sleeping: what was to be slept."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def opened(
    hub: Hub, *, revision: str | None = None, waits: Waits | None = None, lines: list[str] | None = None
) -> StagedSource:
    policy = RetryPolicy(sleep=waits if waits is not None else Waits())
    notify = lines.append if lines is not None else lambda line: None
    return StagedSource(REPO, partial(find_repository, REPO, revision, hub.url), policy, notify)
