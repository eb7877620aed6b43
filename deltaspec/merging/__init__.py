"""Adapters added to weights and to each other."""
