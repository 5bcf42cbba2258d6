"""A run: its ranks from the first to the last line of a script, its folder, its saves.

with ftrain.run.session(shard=8) as run: ...
"""

from ftrain.run.session import Run, session

__all__ = ["Run", "session"]
