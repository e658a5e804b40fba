"""Sampling codes from a generator: temperature, top-k, top-p, guidance, the key-value cache, videos longer than a clip."""
