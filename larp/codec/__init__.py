"""Encoding, decoding and storing whole videos of any length and size."""
