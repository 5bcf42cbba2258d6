"""Signals become a flag; the second Ctrl-C does not."""

import os
import signal
import threading

import pytest

from ftrain.resilience.signals import EXIT_NOT_SAVED, EXIT_RESUMABLE, SIGNALS, interruptible


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_the_loop_goes_on(number):
    steps = 0
    with interruptible() as stop:
        assert not stop.requested
        while not stop.requested:
            steps += 1
            if steps == 3:
                os.kill(os.getpid(), number)
        assert stop.signal == number
    assert steps == 3


def test_the_second_ctrl_c_interrupts():
    with interruptible() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_scheduler_may_signal_as_often_as_it_likes():
    with interruptible() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.requested


def test_handlers_are_put_back_also_after_an_error():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ValueError, match="step failed"), interruptible():
        raise ValueError("step failed")
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_only_the_main_thread_can_listen():
    errors = []

    def listen():
        try:
            with interruptible():
                pass
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert errors == ["interruptible() works in the main thread only: enter it there and pass the flag on"]


def test_exit_codes_differ_from_success_failure_and_each_other():
    assert len({0, 1, 2, EXIT_RESUMABLE, EXIT_NOT_SAVED}) == 5
