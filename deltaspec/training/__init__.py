"""Fine-tuning by any method of the literature, under one loop: what a method changes, and how it is trained."""
