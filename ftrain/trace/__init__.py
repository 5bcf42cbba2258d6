"""From a pure function to a graph: the trace, gradients, what a rank of a mesh computes, and what is refused."""
