"""What a tensor's name means: role, depth, expert, and where its matrices lie."""
