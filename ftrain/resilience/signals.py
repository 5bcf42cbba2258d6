"""Signals as a flag that the training loop looks at between two steps, and the exit codes a launcher may act on.

    with interruptible() as stop:
        for batch in batches:
            state, metrics = step(state, batch)
            if stop.requested:
                checkpoints.save(state, n)
                checkpoints.wait()
                sys.exit(EXIT_RESUMABLE)

SIGTERM is what schedulers send before they kill, SIGUSR1 is Slurm's warning (`--signal=USR1@120`), SIGINT is Ctrl-C.

A launcher between the scheduler and this process decides what arrives. `srun` passes signals and exit codes on.
`torchrun` passes SIGTERM on and kills after 30 s (`--shutdown-timeout`), ends at SIGUSR1 without waiting for its ranks
(`--signals-to-handle`), of which they hear as of SIGTERM (`launcher.py`), and ends with 1 whatever they end with.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ftrain.resilience.launcher import launcher_heard

EXIT_RESUMABLE = 75
"""The run was asked to stop, has saved, and goes on from there when started again (EX_TEMPFAIL of sysexits.h)."""

EXIT_NOT_SAVED = 74
"""The run was asked to stop and could not save; it goes on from the last good step (EX_IOERR of sysexits.h)."""

EXIT_NOT_FINITE = 65
"""The run came to its end with a loss or gradient that is not finite, and may not go back (EX_DATAERR)."""

EXIT_HUNG = 76
"""No step ended in time; the ranks' stacks are written. The run goes on from the last good step (EX_PROTOCOL)."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether, and by which signal, this process was asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        """True from the first signal on."""
        return self.signal is not None

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler: note the signal `number`.

        Raises:
            KeyboardInterrupt: at a second Ctrl-C, for when a step hangs.
        """
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt("second Ctrl-C: stopping without a save")
        self.signal = signal.Signals(number)


@contextmanager
def interruptible() -> Iterator[StopRequest]:
    """Within the block, SIGTERM, SIGINT and SIGUSR1 only set a flag; after it, they do what they did before. The end of
    a torchrun above this process is a SIGTERM.

    >>> import os, signal
    >>> from ftrain.resilience.signals import interruptible
    >>> with interruptible() as stop:
    ...     for step in range(1, 100):
    ...         if step == 3:
    ...             os.kill(os.getpid(), signal.SIGUSR1)
    ...         if stop.requested:
    ...             break
    >>> step, stop.signal.name
    (3, 'SIGUSR1')

    Raises:
        ValueError: not in the main thread, where alone Python lets signals be handled.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("interruptible() works in the main thread only: enter it there and pass the flag on")
    request = StopRequest()
    before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        with launcher_heard():
            yield request
    finally:
        for number, handler in before.items():
            # None: a handler that C code set, which Python cannot name and so not put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
