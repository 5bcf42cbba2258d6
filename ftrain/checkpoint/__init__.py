"""Checkpoints that are atomic, checked when read, and written behind the training steps."""

from ftrain.checkpoint.arrays import Storage
from ftrain.checkpoint.bucket import Bucket
from ftrain.checkpoint.checkpointer import Checkpointer
from ftrain.checkpoint.clean import delete
from ftrain.checkpoint.errors import DamagedCheckpoint, SaveFailed
from ftrain.checkpoint.open_store import latest, open_store, steps
from ftrain.checkpoint.ranks import Ranks
from ftrain.checkpoint.read import restore
from ftrain.checkpoint.retention import Retention, to_delete
from ftrain.checkpoint.shard_layout import Window
from ftrain.checkpoint.write import save

__all__ = [
    "Bucket",
    "Checkpointer",
    "DamagedCheckpoint",
    "Ranks",
    "Retention",
    "SaveFailed",
    "Storage",
    "Window",
    "delete",
    "latest",
    "open_store",
    "restore",
    "save",
    "steps",
    "to_delete",
]
