"""Data: where rows come from, what they say, how they become documents, and the packs that a step trains on.

Everything here is loaded when it is first asked for: readers of some files need packages that a base install has not.
"""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_names

if TYPE_CHECKING:
    from ftrain.data.chat_template import load_tokenizer
    from ftrain.data.documents import IGNORE, Document, Group, lay
    from ftrain.data.encoding import ChatEncoder, Encoded, Length
    from ftrain.data.rejects import BadRow, Rejects
    from ftrain.data.samples import Samples, open_samples
    from ftrain.data.show import as_html, show_rows
    from ftrain.data.sources.opening import open_source
    from ftrain.data.stats import Stats, count

__all__ = [
    "IGNORE", "BadRow", "ChatEncoder", "Document", "Encoded", "Group", "Length", "Rejects", "Samples", "Stats",
    "as_html", "count", "lay", "load_tokenizer", "open_samples", "open_source", "show_rows",
]  # fmt: skip
__getattr__ = lazy_names(
    "ftrain.data",
    {
        "chat_template": ("load_tokenizer",),
        "documents": ("IGNORE", "Document", "Group", "lay"),
        "encoding": ("ChatEncoder", "Encoded", "Length"),
        "rejects": ("BadRow", "Rejects"),
        "samples": ("Samples", "open_samples"),
        "show": ("as_html", "show_rows"),
        "sources.opening": ("open_source",),
        "stats": ("Stats", "count"),
    },
)
