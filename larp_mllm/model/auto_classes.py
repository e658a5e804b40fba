"""Registers config, model and processor with the Auto classes of transformers on `import larp_mllm`, in any import order.

transformers is not imported for this: an import hook imports our module after the module of transformers that it extends.
"""

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder

# Module of transformers -> our module, which registers itself with it at its end.
_EXTENDS = {
    "transformers.models.auto.configuration_auto": "larp_mllm.model.configuration",
    "transformers.models.auto.modeling_auto": "larp_mllm.model.modeling",
    "transformers.models.auto.processing_auto": "larp_mllm.processing.processor",
}


def register() -> None:
    """Register with the modules of transformers that are loaded, and with the others once they are. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for theirs, ours in _EXTENDS.items():
        if theirs in sys.modules:
            _import(ours)


class _Finder:
    """Finds the modules in _EXTENDS as Python does, and imports ours after one was executed."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in _EXTENDS else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module) -> None:
                execute(module)
                _import(_EXTENDS[name])

            spec.loader.exec_module = exec_module
        return spec


def _import(ours: str) -> None:
    try:
        import_module(ours)
    except Exception as error:  # transformers must stay usable
        warnings.warn(
            f"the Auto classes of transformers do not know the models of larp_mllm: {ours} cannot be imported "
            f"({type(error).__name__}: {error}). `import {ours}` shows where",
            stacklevel=2,
        )
