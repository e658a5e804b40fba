"""After `import larp_mllm`, the Auto classes of transformers know its config, model and processor, whichever was imported first.

transformers is not loaded for it: what it needs of ours is imported when it has loaded its own, and registers itself.
"""

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder

# The module of transformers that must be there first -> ours, at whose end the registration stands.
_AFTER = {
    "transformers.models.auto.configuration_auto": "larp_mllm.model.configuration",
    "transformers.models.auto.modeling_auto": "larp_mllm.model.modeling",
    "transformers.models.auto.processing_auto": "larp_mllm.processing.processor",
}


def register() -> None:
    """Register with transformers what of it is loaded already, and the rest as soon as it is. Doing so again is free."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for theirs, ours in _AFTER.items():
        if theirs in sys.modules:
            _import(ours)


class _Finder:
    """Finds the modules in _AFTER as Python does by itself, and has ours imported when one was executed."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in _AFTER else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module) -> None:
                execute(module)
                _import(_AFTER[name])

            spec.loader.exec_module = exec_module
        return spec


def _import(ours: str) -> None:
    try:
        import_module(ours)
    except Exception as error:  # whatever it is, transformers itself must stay usable
        warnings.warn(
            f"the Auto classes of transformers will not know the models of larp_mllm: {ours} cannot be imported "
            f"({type(error).__name__}: {error}); `import {ours}` shows where",
            stacklevel=2,
        )
