"""The model that transformers or diffusers would make of a config: built without weights, and asked what it is."""
