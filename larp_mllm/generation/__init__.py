"""How a language model writes text and codes."""
