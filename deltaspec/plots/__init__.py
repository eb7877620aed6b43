"""Figures: columns in, a matplotlib Figure out; nothing here saves or keeps state."""
