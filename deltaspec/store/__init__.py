"""The run directory: deltaspec's own format."""
