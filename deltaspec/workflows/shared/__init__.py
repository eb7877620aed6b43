"""What several slices need: opened bases, running and meta models, runs that are filled, texts in batches."""
