"""Data for the models: video files -> frames -> clips -> batches, and frames -> video files."""
