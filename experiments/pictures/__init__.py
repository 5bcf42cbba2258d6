"""Small experiments on real pictures: tokenizers trained in several ways, and a model that reads and draws."""
