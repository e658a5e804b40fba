"""What a language model is trained on: token caches, records and text as token sequences, mixed and packed."""
