"""Flower's ClientApp for simulation and plain Flower: opens the site and calls `Site.receive`; no logic.

Under the embedded engine a process serves several virtual sites, so open sites are kept by folder.
"""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from urna.client.local_log import Event, local_log, write
from urna.client.site import Site, open_site
from urna.protocol.errors import ProtocolError
from urna.protocol.sealing import Parcel, from_record, to_record

SITE_DIR_KEY = "site-dir"  # of the SuperNode's --node-config


@cache
def _site(folder: Path) -> Site:
    import torch

    torch.set_num_threads(1)  # one virtual site must not take the cores of another
    return open_site(folder)


def answer_record(site: Site, record: RecordDict) -> RecordDict:
    """What a site answers to what Flower delivered; a record that holds no parcel gets a code, as one that cannot be opened."""
    try:
        parcel = from_record(record)
    except ProtocolError as error:
        write(site.log, Event.REQUEST_FAILED, level=logging.WARNING, error=error)
        parcel = Parcel({}, np.empty(0, np.uint8))
    return to_record(site.receive(parcel))


def client_app(folder_of: Callable[[Context], Path]) -> ClientApp:
    """A ClientApp whose every route hands the message to the site in ``folder_of(context)``."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        folder = folder_of(context)
        try:
            reply = answer_record(_site(folder), message.content)
        except Exception:  # the edge: Flower would send the text to the operator
            local_log(folder.name, folder).exception("a message could not be handled")
            raise RuntimeError("this site cannot answer; its own log says why") from None
        return Message(content=reply, reply_to=message)

    app.query("hello")(answer)
    app.query("weights")(answer)
    app.query("setup")(answer)
    app.query("ballot")(answer)
    app.train()(answer)
    app.evaluate()(answer)
    app.query("unmask")(answer)
    app.query("abort")(answer)
    app.query("close")(answer)
    return app


def _from_node_config(context: Context) -> Path:
    return Path(str(context.node_config[SITE_DIR_KEY]))


app = client_app(_from_node_config)
