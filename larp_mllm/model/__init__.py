"""The language model with video vocabulary: a base of transformers, and the adapter that gives it the codebook."""
