"""Runs that go on: watchdog, bad steps, the way back, replay."""
