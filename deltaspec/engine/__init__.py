"""Runs a function over items on the devices at hand; knows nothing of matrices."""
