"""Runs that go on: watchdog, bad steps, the rollback, replay."""
