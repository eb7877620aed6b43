"""The lowest working floor: files whole or not at all, safetensors headers, the one table of dtypes."""
