"""Sound and pictures in and out with a router for each modality: a composition after Ming-Omni (arXiv 2506.09344)."""
