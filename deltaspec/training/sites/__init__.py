"""The matrices of a running model, the updates beside them, and which of them a method takes."""
