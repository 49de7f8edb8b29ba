"""How long is waited between tries."""

import pytest

from reshard.source.retry import Fault, RetryPolicy


@pytest.mark.parametrize(
    ("asked", "failures", "seconds"),
    [
        (None, 1, 1.0),
        (None, 4, 8.0),
        (None, 9, 30.0),  # no longer than that by itself
        (0.5, 1, 1.0),  # not less than its own, however little a server asks for
        (3.0, 3, 4.0),
        (17.0, 1, 17.0),
        (100.0, 9, 100.0),
    ],
)
def test_the_longer_of_what_a_server_asks_for_and_one_s_own(asked: float | None, failures: int, seconds: float) -> None:
    assert RetryPolicy().delay(Fault("busy", asked), failures) == seconds
