"""Pure decisions of the server: numbers in, numbers out; and `SecureSum` for any Flower ServerApp.

`SecureSum` is loaded when it is first asked for, so that importing this package loads neither Flower nor torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from urna.strategies.secure_sum import SecureSum

__all__ = ["SecureSum"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from urna.strategies import secure_sum

    return getattr(secure_sum, name)
