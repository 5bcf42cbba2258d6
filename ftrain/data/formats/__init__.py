"""Formats of rows: a format makes a sample of the fields of a row. One family of formats a file."""
