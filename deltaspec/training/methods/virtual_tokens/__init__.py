"""Virtual tokens: prefix and prompt tuning."""
