"""Runnable recipes: thin, since what can be shared lies on the floors below."""
