"""Data: where rows come from, what they say, how they become documents, and the packs that a step trains on.

Everything here is loaded when it is first asked for: readers of some files need packages that a base install has not.
"""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_names

if TYPE_CHECKING:
    from ftrain.data.chat_template import load_tokenizer
    from ftrain.data.cost import Cost
    from ftrain.data.documents import IGNORE, Document, Group, lay
    from ftrain.data.encoding import ChatEncoder, Encoded, Length
    from ftrain.data.encoding_ahead import Workers, mean_tokens
    from ftrain.data.layout import PackLayout, RowLayout
    from ftrain.data.loader import Facts, Loader, Step
    from ftrain.data.media.families import family_of
    from ftrain.data.media_finishing import ReadMedia
    from ftrain.data.mixture import by_temperature, by_tokens
    from ftrain.data.order import Order
    from ftrain.data.packing import Packing
    from ftrain.data.position import Position
    from ftrain.data.rejects import BadRow, Rejects
    from ftrain.data.samples import Samples, open_samples
    from ftrain.data.show import as_html, show_rows
    from ftrain.data.sources.opening import open_source
    from ftrain.data.stats import Stats, count

__all__ = [
    "IGNORE", "BadRow", "ChatEncoder", "Cost", "Document", "Encoded", "Facts", "Group", "Length", "Loader", "Order",
    "PackLayout", "Packing", "Position", "ReadMedia", "Rejects", "RowLayout", "Samples", "Stats", "Step", "Workers",
    "as_html", "by_temperature", "by_tokens", "count", "family_of", "lay", "load_tokenizer", "mean_tokens",
    "open_samples", "open_source", "show_rows",
]  # fmt: skip
__getattr__ = lazy_names(
    "ftrain.data",
    {
        "chat_template": ("load_tokenizer",),
        "cost": ("Cost",),
        "documents": ("IGNORE", "Document", "Group", "lay"),
        "encoding": ("ChatEncoder", "Encoded", "Length"),
        "encoding_ahead": ("Workers", "mean_tokens"),
        "loader": ("Facts", "Loader", "Step"),
        "layout": ("PackLayout", "RowLayout"),
        "media.families": ("family_of",),
        "media_finishing": ("ReadMedia",),
        "mixture": ("by_temperature", "by_tokens"),
        "order": ("Order",),
        "packing": ("Packing",),
        "position": ("Position",),
        "rejects": ("BadRow", "Rejects"),
        "samples": ("Samples", "open_samples"),
        "show": ("as_html", "show_rows"),
        "sources.opening": ("open_source",),
        "stats": ("Stats", "count"),
    },
)
