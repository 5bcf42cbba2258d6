"""Checkpoints that are atomic, checked when read, and written behind the training steps."""

from ftrain.checkpoint.arrays import Storage
from ftrain.checkpoint.boxes import Window
from ftrain.checkpoint.bucket import Bucket
from ftrain.checkpoint.checkpointer import Checkpointer
from ftrain.checkpoint.clean import delete
from ftrain.checkpoint.errors import DamagedCheckpoint, SaveFailed
from ftrain.checkpoint.ranks import Ranks
from ftrain.checkpoint.read import restore
from ftrain.checkpoint.retention import Retention, to_delete
from ftrain.checkpoint.roots import latest, open_place, steps
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
    "open_place",
    "restore",
    "save",
    "steps",
    "to_delete",
]
