"""Which layout to train with: a search, plan files, and `ftrain.jit`, which takes either."""
