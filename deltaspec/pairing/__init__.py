"""Two checkpoints → pairs of matrices, by name; whatever is not compared is listed with its reason."""
