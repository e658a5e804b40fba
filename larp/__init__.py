"""LARP: a video tokenizer whose codes are easy to predict, and the generator that predicts them.

    from larp import LarpTokenizer
    tokenizer = LarpTokenizer.from_pretrained("runs/tokenizer/model")
    codes = tokenizer.encode(clip)

Names are imported on first use, so that `import larp` does not import torch.
"""

import os
from importlib import import_module

# OpenMP threads that spin while waiting make small models up to 20 times slower when other processes use the cores, with no
# measurable gain otherwise (LOG.md). torch reads the variable when it is imported, so larp is imported before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_MODULES = {
    "LarpTokenizer": "models.tokenizer",
    "TokenizerConfig": "models.tokenizer_config",
    "LarpGenerator": "models.generator",
    "GeneratorConfig": "models.generator",
    "generate": "sampling.sample",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
