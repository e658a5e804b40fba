"""Whole videos through a tokenizer: window by window, in files of codes, back at their own size."""
