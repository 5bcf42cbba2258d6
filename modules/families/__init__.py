"""Families of text models beyond the plain decoder: each a `DecoderConfig` with layers of its own and its names."""
