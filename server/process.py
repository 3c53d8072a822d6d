"""The edges of an engine's process: it ends with its parent, and every error ends in the journal and an exit code."""

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from urna.protocol.errors import UrnaError

LOG_FILE, ERROR_FILE = "engine.log", "error.txt"
INTERRUPTED = 130


def engine_process(run: Callable[[Path], None], arguments: list[str], at_interrupt: Callable[[], None] = lambda: None) -> int:
    """Run ``run(run_dir)`` with the run's folder from the command line; 0, or the exit code of the error.

    The error's text is written beside the journal, so that whoever watches the run can say it. ``at_interrupt`` is called
    when the parent is gone, before the process ends.
    """
    run_dir = Path(arguments[0])
    threading.Thread(target=_end_with_parent, args=(at_interrupt,), daemon=True).start()
    log_to(run_dir)
    (run_dir / ERROR_FILE).unlink(missing_ok=True)
    try:
        run(run_dir)
    except Exception as error:  # the edge of the process: answered in one line
        return record_error(run_dir, error)
    return 0


def log_to(run_dir: Path) -> None:
    """Send this process's warnings to the run's log."""
    handler = logging.FileHandler(run_dir / LOG_FILE, encoding="utf-8")
    handler.setLevel(logging.WARNING)  # Flower's logger sets its own level
    logging.basicConfig(handlers=[handler], level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")


def record_error(run_dir: Path, error: Exception) -> int:
    """Write why a run stopped in one line beside its journal, and what nobody foresaw in full into its log; the exit code."""
    if isinstance(error, UrnaError):
        text, code = str(error), error.exit_code
    else:
        logging.getLogger(__name__).error("the engine stopped", exc_info=error)
        text, code = f"the engine stopped: {type(error).__name__}; details are in {run_dir / LOG_FILE}", 1
    (run_dir / ERROR_FILE).write_text(text, encoding="utf-8")
    return code


def _end_with_parent(at_interrupt: Callable[[], None]) -> None:
    """Standard input closes when the process that started this one is gone, however it went."""
    while os.read(0, 4096):  # not sys.stdin: its lock would be held when the interpreter ends
        pass
    try:
        at_interrupt()
    finally:
        os._exit(INTERRUPTED)
