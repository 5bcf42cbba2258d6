"""Models as pure functions: `specs(cfg)` and `apply(params, ...)`, one file for each block or family."""
