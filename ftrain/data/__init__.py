"""Data: where rows come from, what they say, how they become documents, and the packs that a step trains on."""
