"""A base and adapters → a merged checkpoint, streamed tensor by tensor."""
