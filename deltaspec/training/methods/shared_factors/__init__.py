"""Methods whose factors are shared or frozen: VB-LoRA, VeRA, Tied-LoRA, LoRA-XS."""
