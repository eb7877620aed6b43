"""From a delta to low-rank factors: how many directions, which, and how good they are."""
