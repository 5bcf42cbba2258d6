"""A run: its ranks from the first to the last line of a script, its folder, its saves.

with ftrain.run.session(shard=8) as run:
    ...
"""

from ftrain.run.folder import RunFolder, read_config, read_metrics
from ftrain.run.late import Done, Issued, LateReader
from ftrain.run.ranks import MeshFlags, any_rank, is_main, of_main, open_mesh
from ftrain.run.saves import NotSaved, Saves
from ftrain.run.session import Run, session

__all__ = [
    "Done",
    "Issued",
    "LateReader",
    "MeshFlags",
    "NotSaved",
    "Run",
    "RunFolder",
    "Saves",
    "any_rank",
    "is_main",
    "of_main",
    "open_mesh",
    "read_config",
    "read_metrics",
    "session",
]
