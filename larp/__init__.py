"""LARP: a video tokenizer whose codes are easy to predict, and the generator that predicts them."""

import os

# OpenMP threads that spin while they wait make small models up to 20 times slower where another process wants the cores, and
# gain nothing measurable where none does (LOG.md). It is read when torch is loaded, so larp is imported before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
