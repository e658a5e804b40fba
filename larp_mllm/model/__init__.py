"""The language model with video vocabulary: a base model of transformers, and the adapter for video ids."""
