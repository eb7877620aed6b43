"""Two checkpoints → a low-rank adapter of their difference, with a certificate; sums of adapters; layer inputs."""
