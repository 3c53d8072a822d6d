"""The edge of both command lines: an error of the tree ends in one line and its exit code, never in a traceback."""

import io
import os
import sys
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from urna.protocol.errors import BadInputError, UrnaError

INTERRUPTED = 130


def run(app: Callable[[], object]) -> None:
    """Call ``app`` and leave the process as its errors say; a file or folder that refuses is bad input."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without the signs we print shows others, and no traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except UrnaError as error:
        _end(str(error), error.exit_code)
    except BrokenPipeError:
        os._exit(0)
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)
    except OSError as error:
        _end(
            f"{error.filename or 'a file'}: {error.strerror or error}: check the path and its permissions",
            BadInputError.exit_code,
        )


def _end(text: str, code: int) -> None:
    Console(stderr=True, highlight=False).print(Text(f"error: {text}"), soft_wrap=True)
    sys.exit(code)
