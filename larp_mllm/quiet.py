"""Silence while transformers reads and writes models: what a program prints is its own, and a shell takes it as a path."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging


@contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """In the block, no warnings or tables of transformers, nor of what it imports when it saves; errors are raised.

    bars: leave those of loading and of downloads as they are; by default there are none either.
    """
    level, variable = logging.get_verbosity(), "DS_ACCELERATOR"
    own = variable not in os.environ and not torch.accelerator.is_available()
    hidden = not bars and logging.is_progress_bar_enabled()
    if hidden:
        logging.disable_progress_bar()
    logging.set_verbosity_error()
    if own:
        # Saving imports deepspeed, which without this warns on the standard output that it could find no accelerator.
        os.environ[variable] = "cpu"
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if hidden:
            logging.enable_progress_bar()
        if own:
            os.environ.pop(variable, None)
