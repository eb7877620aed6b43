"""The one loop that trains every method: steps, learning rates, resumption, sharded parameters."""
