"""Checkpoints that are atomic, checked when read, and written behind the training steps."""

from ftrain.checkpoint.arrays import Storage
from ftrain.checkpoint.checkpointer import Checkpointer
from ftrain.checkpoint.clean import delete
from ftrain.checkpoint.errors import DamagedCheckpoint, SaveFailed
from ftrain.checkpoint.folders import latest, steps
from ftrain.checkpoint.read import restore
from ftrain.checkpoint.retention import Retention, to_delete
from ftrain.checkpoint.write import save

__all__ = [
    "Checkpointer",
    "DamagedCheckpoint",
    "Retention",
    "SaveFailed",
    "Storage",
    "delete",
    "latest",
    "restore",
    "save",
    "steps",
    "to_delete",
]
