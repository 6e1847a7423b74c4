"""Loss terms that any SAE can have, one file each."""

# Imported for their registration.
from clipsae.sae.objectives import monosemanticity, orthogonality  # noqa: F401
