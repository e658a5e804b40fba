"""How a language model generates text and codes."""
