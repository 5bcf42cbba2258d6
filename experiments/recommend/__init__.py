"""A recommender on text, pictures and categorical features, beside two towers: `python -m experiments.recommend`."""
