"""An adapter against the fine-tune that it stands for: factors recomputed, outputs compared."""
