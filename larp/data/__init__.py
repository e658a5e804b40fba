"""Videos on their way to the models: files -> frames -> clips -> batches, and back to files."""
