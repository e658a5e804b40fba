"""Video vocabulary for Llama- and Qwen-style language models of transformers: they read and generate LARP codes.

    import larp_mllm
    larp_mllm.generate("a person surfing").save("surfing.mp4")

The names below are imported at first use, so that `import larp_mllm` stays light.
"""

from importlib import import_module

import larp  # noqa: F401  (before torch: it configures torch's threads)
from larp_mllm.model.auto_classes import register

_MODULES = {
    "generate": "api",
    "describe": "api",
    "continue_video": "api",
    "chat": "api",
    "set_default_model": "locate",
    "Mllm": "pipeline",
    "Video": "video",
    "VideoSampling": "generation.sampling",
    "TextSampling": "generation.sampling",
    "Progress": "generation.progress",
    "LarpMllmConfig": "model.configuration",
    "LarpMllmForCausalLM": "model.modeling",
    "LarpMllmProcessor": "processing.processor",
    "Vocabulary": "model.vocabulary",
}

__all__ = sorted(_MODULES)

register()


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
