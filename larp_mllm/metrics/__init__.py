"""What a trained language model is worth, in figures."""
