"""Export of a model as a stock checkpoint of its base's architecture."""
