"""A tool: the training of the built-in CLIP, `python -m clipsae.pretraining`."""
