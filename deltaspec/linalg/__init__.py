"""Matrix decompositions: tensors in, tensors out."""
