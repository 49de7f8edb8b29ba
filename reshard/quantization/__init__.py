"""What the dense layers' weights are quantized as: what is said of it, and what the tensors bear out."""

from reshard.quantization.accounts import Account, Accounts, Recorded, list_accounts, without_quantization
from reshard.quantization.decide import Schemes
from reshard.quantization.transforms import check_transforms

__all__ = [
    "Account",
    "Accounts",
    "Recorded",
    "Schemes",
    "check_transforms",
    "list_accounts",
    "without_quantization",
]
