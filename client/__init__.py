"""The site's side: policy, ledger, data and the three kinds of work; and `secure_sum_mod` for any Flower ClientApp.

The two names are loaded when they are first asked for, so that importing this package loads neither Flower nor torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from urna.client.flower_mod import make_secure_sum_mod, secure_sum_mod

__all__ = ["make_secure_sum_mod", "secure_sum_mod"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from urna.client import flower_mod

    return getattr(flower_mod, name)
