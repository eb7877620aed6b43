"""Fine-tuning by any method, on disk: planned, counted, run, measured, saved and resumed."""
