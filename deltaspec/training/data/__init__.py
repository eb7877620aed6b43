"""Data of any kind → token ids, and the batches of every step."""
