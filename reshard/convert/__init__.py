"""Other weights out of a checkpoint's own: `--weights`."""

from typing import Literal

Weights = Literal["keep", "bf16", "w8a8"]
"""What `--weights` takes: to leave the weights as they are, or the `option` of a scheme of the table."""
