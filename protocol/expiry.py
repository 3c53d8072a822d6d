"""How long a certificate is still good for; asked by the site's doctor as by the operator."""

import datetime
from pathlib import Path

from urna.protocol.errors import BadInputError


def days_left(path: Path) -> int:
    """Whole days until the first certificate of a PEM file ends; negative once it has.

    Raises:
        BadInputError: there is no certificate at ``path``.
    """
    return (valid_until(path) - datetime.datetime.now(datetime.UTC)).days


def valid_until(path: Path) -> datetime.datetime:
    """When the first certificate of a PEM file ends (UTC).

    Raises:
        BadInputError: there is no certificate at ``path``.
    """
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except OSError as error:
        raise BadInputError(f"expected a certificate at {path}, found none that can be read ({error.strerror})") from None
    except ValueError:
        raise BadInputError(f"{path}: expected a certificate in PEM, found something else: ask the operator for it") from None
