"""Loss terms that any SAE can have, one file each."""

# Imported for their registration.
from clipsae.sae.objectives import (  # noqa: F401
    monosemanticity,
    nested_k,
    orthogonality,
    pre_activation,
    prefixes,
)
