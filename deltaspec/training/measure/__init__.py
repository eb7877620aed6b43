"""How good a model is on held-out examples, and what it still knows of others."""
