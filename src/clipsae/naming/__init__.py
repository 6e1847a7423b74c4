"""What a latent means in words, and how far the words can be trusted."""

from clipsae.naming.names import Names
from clipsae.naming.vocabulary import Vocabulary

__all__ = ["Names", "Vocabulary"]
