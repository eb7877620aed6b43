"""Methods that train the base's own weights: full, last layers, BitFit."""
