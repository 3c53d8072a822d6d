"""What a site's records look like once they are loaded: for the site's own screen, it shows values."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from urna.client.dataset import ColumnSchema, DatasetConfig, load
from urna.client.records import Images, Inputs, Texts

SHOWN_CHARACTERS = 300  # of a text


@dataclass(frozen=True)
class PreviewTable:
    """What the loaded records look like. It shows values: it is for the site's own screen."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_records: int
    num_units: int
    num_left_out: int  # over a person's cap
    num_by_label: Mapping[str, int]
    num_scrubbed: Mapping[str, int]  # by token: EMAIL, PHONE ...


def preview(folder: Path, config: DatasetConfig, key: bytes, num_rows: int = 5) -> PreviewTable:
    """Read all of a site's records and show the first ones, as they are after de-identification.

    Raises:
        SiteConfigError: as `load_records`.
    """
    loaded = load(folder, config, key)
    records = loaded.records
    person = () if config.person_column is None else (config.person_column,)
    names, cells = _shown(records.inputs, config, min(num_rows, len(records)))
    rows = []
    for at, shown in enumerate(cells):
        unit = (records.units[at],) if person else ()
        rows.append((records.ids[at], *unit, config.label_names[records.labels[at]], *shown))
    counts = np.bincount(records.labels, minlength=len(config.label_names)).tolist()
    return PreviewTable(
        columns=(config.id_column, *person, config.label_column, *names),
        rows=tuple(rows),
        num_records=len(records),
        num_units=len(set(records.units)),
        num_left_out=loaded.num_read - len(records),
        num_by_label=dict(zip(config.label_names, counts, strict=True)),
        num_scrubbed=dict(sorted(loaded.scrubbed.items())),
    )


def _shown(inputs: Inputs, config: DatasetConfig, num_rows: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns, and cells of the first rows."""
    if isinstance(inputs, Images):
        size = " x ".join(map(str, config.image_shape))
        return ("image",), [(f"{size}, {one.min():.2f} to {one.max():.2f}",) for one in inputs.pixels[:num_rows]]
    if isinstance(inputs, Texts):
        return (config.text_column,), [(text[:SHOWN_CHARACTERS],) for text in inputs.texts[:num_rows]]

    def cell(one: ColumnSchema, value: float) -> str:
        return one.categories[int(value)] if one.type == "category" else f"{value:g}"

    rows = [tuple(cell(one, inputs.columns[one.name][at]) for one in config.columns) for at in range(num_rows)]
    return tuple(one.name for one in config.columns), rows
