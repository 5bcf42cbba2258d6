"""Search of layouts: every legal way to run a step on a cluster, priced on paper, ranked."""
