"""What the dense layers' weights are quantized as: what is said of it, and what the tensors bear out."""

from reshard.quantization.accounts import (
    MODELOPT,
    SIDE_FILES,
    Account,
    Accounts,
    is_side_file,
    list_accounts,
    read_accounts,
    without_quantization,
)
from reshard.quantization.decide import Schemes
from reshard.quantization.description import DESCRIPTION, is_description
from reshard.quantization.methods import key_of_left_alone
from reshard.quantization.transforms import check_transforms

__all__ = [
    "DESCRIPTION",
    "MODELOPT",
    "SIDE_FILES",
    "Account",
    "Accounts",
    "Schemes",
    "check_transforms",
    "is_description",
    "is_side_file",
    "key_of_left_alone",
    "list_accounts",
    "read_accounts",
    "without_quantization",
]
