"""What can go wrong with a checkpoint that is neither the caller's arguments nor a bug."""


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing, short, or holds other bytes than were written. The message names it."""


class SaveFailed(RuntimeError):
    """A write did not reach the disk. The state in memory and the steps saved before are untouched."""
