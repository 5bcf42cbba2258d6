"""Categorical features (users, items, brands, countries) as rows of hashed tables, a modality of the omni composition.

Values are hashed on the host to rows of a table of fixed size, a field each, so that new values need no new rows
(Weinberger et al. 2009). Row 0 stands for "no value". An event is the sum of the rows of its fields; a list of events,
such as a history, is one item of the token stream. The tables are parameters as all others: their rows are divided as a
plan says.

Legend: n events, V rows of a table, D width.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ftrain.modules import embedding
from ftrain.modules.omni import Encoder, Row
from ftrain.modules.spec import Normal, ParamSpec

ABSENT = 0
"""The row of events that have no value of a field."""


@dataclass(frozen=True)
class TablesConfig:
    """`rows`: how many rows the table of each field has; `d_out`: D; `init_std`: the rows' initial deviation.

    ValueError for no fields, or a table of fewer than 2 rows (one of them stands for "no value").
    """

    rows: Mapping[str, int]
    d_out: int
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("TablesConfig.rows names no field")
        for field, rows in self.rows.items():
            if rows < 2:
                raise ValueError(
                    f"TablesConfig.rows[{field!r}]={rows}: a table needs at least 2 rows, one for no value"
                )


def hashed(values: Iterable[str | int | None], field: str, *, cfg: TablesConfig) -> np.ndarray:
    """The row of each value in the field's table: int64 `[n]` in [1, V), and 0 for None.

    The same in every process and run. Two values may share a row; two fields never share a table. ValueError for a
    field that the tables have not, and for a value that is no text and no whole number.

    >>> cfg = TablesConfig({"brand": 1000}, d_out=8)
    >>> rows_n = hashed(["acme", None, "acme"], "brand", cfg=cfg)
    >>> int(rows_n[0] - rows_n[2]), int(rows_n[1])
    (0, 0)
    """
    if field not in cfg.rows:
        raise ValueError(f"there is no table for the field {field!r}; there are tables for {sorted(cfg.rows)}")
    return np.fromiter((_row(value, field, cfg.rows[field]) for value in values), np.int64)


def _row(value: str | int | None, field: str, rows: int) -> int:
    if value is None:
        return ABSENT
    if isinstance(value, bool) or not isinstance(value, str | int | np.integer):
        raise ValueError(f"field {field!r}: {value!r} is no text and no whole number: cut numbers into buckets first")
    text = value if isinstance(value, str) else f"{int(value)}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "little") % (rows - 1)


def specs(cfg: TablesConfig) -> dict[str, dict[str, ParamSpec]]:
    """A table for each field: `<field>.table_VD`.

    >>> specs(TablesConfig({"brand": 1000}, d_out=8))["brand"]["table_VD"].shape
    (1000, 8)
    """
    return {
        field: embedding.specs(rows, cfg.d_out, init=Normal(cfg.init_std)) for field, rows in sorted(cfg.rows.items())
    }


def lm_encode(params: Any, features: Mapping[str, Any], *, cfg: TablesConfig) -> Tensor:
    """Rows of each field, int64 `[n]` by its name, to events `[n, D]`: the sum over fields.

    >>> import torch
    >>> tables = {"a": {"table_VD": torch.tensor([[0.0], [1.0]])}, "b": {"table_VD": torch.tensor([[0.0], [5.0]])}}
    >>> events = {"a": torch.tensor([1, 0]), "b": torch.tensor([1, 1])}
    >>> lm_encode(tables, events, cfg=TablesConfig({"a": 2, "b": 2}, d_out=1)).flatten().tolist()
    [6.0, 5.0]
    """
    first, *others = sorted(cfg.rows)
    total_nD = embedding.apply(params[first], features[first])
    for field in others:
        total_nD = total_nD + embedding.apply(params[field], features[field])
    return total_nD


def encoder(cfg: TablesConfig, *, begin: int, end: int) -> Encoder:
    """The modality for `OmniModel`: a token for each event; `begin`, `end` are the ids of the tokens around an item."""
    return Encoder(
        specs=specs(cfg),
        lm_encode=lambda params, features: lm_encode(params, features, cfg=cfg),
        features={field: Row((), "int64") for field in sorted(cfg.rows)},
        rows_per_token=1,
        begin=begin,
        end=end,
    )
