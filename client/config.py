"""``site.toml``: what this site is called, where its records are, what it allows, how it reaches the federation."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator

from urna.client.compute import Compute
from urna.client.dataset import DatasetConfig
from urna.client.policy import Policy
from urna.protocol.errors import SiteConfigError
from urna.protocol.plan import Name, Plan, Section, explain, read_document

CONFIG_FILE, DATA_KEY_FILE, LEDGER_FILE = "site.toml", "data.key", "ledger.sqlite"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Port = Annotated[int, Field(ge=1, le=65_535)]


VaultPath = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,1000}$")]


class Vault(Section):
    """``[vault]``: where the ledger and the data key are; nodes that hold the same records share one."""

    folder: VaultPath = "."  # relative to the site's folder, or absolute
    anchor: VaultPath = "ledger.anchor"  # the ledger's last head; keep it on another disk than the ledger, out of its backups


class Link(Section):
    """``[link]``: how this site's SuperNode reaches the federation, and how the runner reaches the SuperNode."""

    superlink: str  # host:port of the SuperLink, or of the proxy before it
    root_certificates: str = "ca.pem"  # relative to the site's folder
    node_key: str = "node.key"  # the SuperNode's key, which the operator has registered
    runtime_port: Port = 9094  # of the SuperNode's Runtime API, on 127.0.0.1
    health_port: Port = 9097  # of the SuperNode's gRPC health service, on 127.0.0.1
    allowed_bundles: tuple[Sha256, ...] | None = None  # app bundles that a run may come with; none is ever run; None: any


class SiteConfig(Section):
    """``site.toml``."""

    name: Name
    dataset: Annotated[tuple[DatasetConfig, ...], Field(min_length=1, max_length=100)]
    policy: Policy
    vault: Vault = Vault()
    compute: Compute = Compute()
    link: Link | None = None  # None: this site is served by a simulation or a stock ClientApp

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [one.name for one in self.dataset]
        if len(set(names)) != len(names):
            raise ValueError(f"expected data sets of different names, found {', '.join(sorted(names))}: rename one")
        return self

    def dataset_for(self, plan: Plan) -> DatasetConfig | None:
        """The records that a plan is about: those that it names, or the first that fit; None if there are none."""
        task = plan.task
        for one in self.dataset:
            fits = one.modality == task.modality and len(one.label_names) == task.num_classes
            if fits and task.dataset in (None, one.name):
                return one
        return None


def load_site_config(folder: Path) -> SiteConfig:
    """Read ``site.toml``.

    Raises:
        SiteConfigError: missing, not TOML, or a key that is unknown, missing or out of range.
    """
    path = folder / CONFIG_FILE
    document = read_document(path, "site.toml", SiteConfigError)
    try:
        return SiteConfig.model_validate(document)
    except ValidationError as error:
        raise SiteConfigError(f"{path}: {explain(error, SiteConfig)}") from None
