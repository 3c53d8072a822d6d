"""`secure_sum_mod`: a Flower ClientApp answers with masked sums instead of its update, metrics and number of examples.

    app = ClientApp(mods=[secure_sum_mod])

The server runs its strategy inside `urna.strategies.SecureSum`. The site's folder (`identity.key`, `roster.json`; see
`create_consortium`) is ``site-dir`` of the SuperNode's node config; without that, in a simulation, the one of this partition
under ``consortium-dir`` of the run config.

Covered:
    * requests without the operator's signature are refused, so a server cannot get a plain update by asking plainly;
    * nothing of the app's reply leaves but masked numbers: no plain arrays, metrics, weights, names of records or errors;
    * no key ever is in Flower's ``context``, which SuperNode and server could read.
Not covered:
    * an app that leaves this mod out: a SuperNode runs whatever code a run brings, so who may start runs decides;
    * sums over two cohorts that differ by one site: their difference is that site's, unless the app adds noise;
    * mods listed before this one see what the server sees; list this one first, so that all others work inside it.
"""

import logging
from collections.abc import Callable
from math import prod
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.constant import ErrorCode

from urna.client.mean_site import Received, Worked, open_mean_site
from urna.protocol.averaging import content_sha256, without_header
from urna.protocol.errors import ProtocolError, SiteConfigError
from urna.protocol.identity import SITES_DIR
from urna.protocol.messages import to_record

SITE_DIR_KEY = "site-dir"  # of the SuperNode's --node-config
CONSORTIUM_DIR_KEY = "consortium-dir"  # of the run config, in a simulation
PLAIN = "bad_request: this site answers only requests of urna.strategies.SecureSum"
CLOSED = "internal: this site cannot answer; its own log says why"
log = logging.getLogger("urna.site")


def make_secure_sum_mod(min_cohort: int = 3, min_colluding: int = 1, folder_of: Callable[[Context], Path] | None = None) -> Mod:
    """A mod with a site's own minimum.

    Args:
        min_cohort: the smallest number of sites whose sum may be opened; at least 2.
        min_colluding: how many members that work together with the server the masks must bear.
        folder_of: where a site's keys are, if not where `own_folder` finds them.

    Raises:
        ValueError: a sum of one site is its update.
    """
    if min_cohort < 2 or min_colluding < 0:
        raise ValueError(
            f"expected min_cohort of at least 2 and min_colluding of at least 0, found {min_cohort}, {min_colluding}"
        )
    find = own_folder if folder_of is None else folder_of

    def secure_sum_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Answer a request of `urna.strategies.SecureSum`; refuse any other."""
        envelope = without_header(message.content) if message.has_content() else None
        if envelope is None:
            log.warning("refused: a message without a request of urna.strategies.SecureSum")
            return _error(message, PLAIN)
        try:
            arrays = [array for record in message.content.array_records.values() for array in record.values()]
            received = Received(
                context.run_id,
                message.metadata.message_type,
                content_sha256(message.content),
                len(arrays),
                sum(prod(array.shape) for array in arrays),
            )
            with open_mean_site(find(context), min_cohort, min_colluding) as site:
                reply = site.handle(envelope, received, lambda: _worked(message, context, call_next))
            return Message(to_record(reply), reply_to=message)
        except Exception:  # the edge: Flower would send the text to the server
            log.exception("this site cannot answer")
            return _error(message, CLOSED)

    return secure_sum_mod


def own_folder(context: Context) -> Path:
    """Where this site's keys are; what a site says itself is never overruled by what a run says.

    Raises:
        SiteConfigError: neither the node config nor the run config says it.
    """
    own = context.node_config.get(SITE_DIR_KEY)
    if own is not None:
        return Path(str(own))
    consortium, number = context.run_config.get(CONSORTIUM_DIR_KEY), context.node_config.get("partition-id")
    if consortium is None or number is None:
        raise SiteConfigError(
            f"expected {SITE_DIR_KEY!r} in the node config, or {CONSORTIUM_DIR_KEY!r} in the run config of a simulation"
        )
    return Path(str(consortium)) / SITES_DIR / f"site-{int(number) + 1}"


def _worked(message: Message, context: Context, call_next: ClientAppCallable) -> Worked:
    """Let the app answer; it may change or empty the message's records.

    Raises:
        ProtocolError: the message has several array records, so that it is not clear what an update is relative to.
        SiteConfigError: the app's reply is none that can be averaged.
    """
    training = message.metadata.message_type.startswith("train")
    records = message.content.array_records if training else {}
    if training and len(records) != 1:
        raise ProtocolError(f"expected one array record to train on, found {len(records)}")
    received = {name: array for record in records.values() for name, array in record.items()}
    reply = call_next(message, context)
    if reply.has_error():
        raise SiteConfigError(f"expected a reply of the app, found its error {reply.error.code}")
    returned = reply.content.array_records if training else {}
    metrics = list(reply.content.metric_records.values())
    if len(returned) != int(training) or len(metrics) != 1:
        raise SiteConfigError(f"expected one array and one metric record, found {len(returned)} and {len(metrics)}")
    before = {name: array.numpy() for name, array in received.items()}
    after = {name: array.numpy() for record in returned.values() for name, array in record.items()}
    return Worked(before, after, dict(metrics[0]))


def _error(message: Message, reason: str) -> Message:
    return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, reason), reply_to=message)


secure_sum_mod = make_secure_sum_mod()
