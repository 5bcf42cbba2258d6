"""Speech in, text and speech out at the same time: a composition after Stream-Omni (arXiv 2506.13642)."""
