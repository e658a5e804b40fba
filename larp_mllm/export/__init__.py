"""A model as a stock checkpoint of its base's architecture."""
