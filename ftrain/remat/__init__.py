"""What the backward computes again, or fetches from the host, instead of keeping it."""
