"""Video as vocabulary: any Llama/Qwen-style language model of transformers reads and writes LARP tokens.

    import larp_mllm
    larp_mllm.generate("a person surfing").save("surfing.mp4")

Names are loaded when they are first used, so that `import larp_mllm` stays light.
"""

from importlib import import_module

import larp  # noqa: F401  (before torch: it sets how torch's threads wait)
from larp_mllm.model.auto_classes import register

_MODULES = {
    "generate": "api",
    "describe": "api",
    "continue_video": "api",
    "chat": "api",
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
