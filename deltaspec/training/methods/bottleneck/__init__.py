"""Bottleneck adapters: series, parallel, Compacter."""
