"""Changes of a graph that keep every value to the bit, one a file."""
