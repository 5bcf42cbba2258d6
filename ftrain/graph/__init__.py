"""The graph of a step as data: nodes, loops, memory they look at, the lines they came from."""
