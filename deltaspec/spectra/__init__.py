"""What a spectrum says: metrics, and what noise alone would score."""
