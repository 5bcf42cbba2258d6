"""Rows of the coverage bench: models that exist, each against the plain module that it was made of."""
