"""What latents mean, in words, with scores."""
