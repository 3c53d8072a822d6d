"""The edges of an engine's process: it ends with its parent, and every error ends in the journal and an exit code."""

import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from urna.protocol.errors import UrnaError
from urna.server.journal import Journal

LOG_FILE = "engine.log"
INTERRUPTED = 130


def engine_process(run: Callable[[Path], None], arguments: list[str]) -> int:
    """Run ``run(run_dir)`` with the run's folder from the command line; 0, or the exit code of the error.

    The error's text is written beside the journal, so that whoever watches the run can say it.
    """
    run_dir = Path(arguments[0])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(filename=run_dir / LOG_FILE, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    error_file = run_dir / "error.txt"
    error_file.unlink(missing_ok=True)
    try:
        run(run_dir)
    except UrnaError as error:
        error_file.write_text(str(error), encoding="utf-8")
        return error.exit_code
    except Exception as error:  # the edge of the process: logged in full, answered in one line
        logging.getLogger(__name__).exception("the engine stopped")
        error_file.write_text(f"the engine stopped: {type(error).__name__}; details are in {run_dir / LOG_FILE}", encoding="utf-8")
        return 1
    return 0


def _end_with_parent() -> None:
    """Standard input closes when the process that started this one is gone, however it went."""
    sys.stdin.buffer.read()
    os._exit(INTERRUPTED)


__all__ = ["Journal", "engine_process"]
