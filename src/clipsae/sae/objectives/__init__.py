"""Loss terms that any SAE can have, one file each."""

# Imported for their registration.
from clipsae.sae.objectives import nested_k, prefixes  # noqa: F401
