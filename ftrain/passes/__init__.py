"""Passes: plain functions `graph -> graph`, each with its contract in its docstring. Default passes change no bit."""
