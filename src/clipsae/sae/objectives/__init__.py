"""Loss terms that any SAE can have, one file each."""
