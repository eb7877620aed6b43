"""Several adapters on one model: switched, merged, or one for each row of a batch."""
