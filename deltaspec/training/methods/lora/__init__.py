"""LoRA and its options: rsLoRA, DoRA, PiSSA, LoRA+."""
