"""What a check of `urna-site check` looks at, and what it says."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from urna.protocol.errors import UrnaError

if TYPE_CHECKING:
    from urna.client.config import Link, SiteConfig
    from urna.client.control import SiteStatus

Level = Literal["ok", "warn", "no", "skip"]


@dataclass(frozen=True)
class Finding:
    """One line of the list."""

    name: str
    level: Level
    text: str
    remedy: str = ""  # what to do about it
    seconds: float = 0.0  # that the check took


@dataclass(frozen=True)
class Subject:
    """What is looked at."""

    folder: Path
    offline: bool
    config: "SiteConfig | None"  # None: site.toml cannot be read, which is a finding of its own
    trouble: UrnaError | None  # why it cannot
    runner: "SiteStatus | None"  # None: it does not run

    @property
    def vault(self) -> Path:
        """Where the ledger and the data key are."""
        from urna.client.vault import vault_folder

        return self.folder if self.config is None else vault_folder(self.folder, self.config.vault)

    @property
    def link(self) -> "Link | None":
        """How this site reaches the federation."""
        return self.config.link if self.config else None


Check = Callable[[Subject], Iterator[Finding]]
