"""Training data of a language model: token caches, records and text as token sequences, mixed and packed."""
