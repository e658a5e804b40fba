"""A generator writes codes: temperature, cuts and guidance, the key-value cache, videos longer than a clip."""
