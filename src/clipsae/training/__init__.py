"""Training: the LightningModule around any SAE, its checkpoints and the numbers one watches."""
