"""Video as vocabulary: any Llama/Qwen-style language model of transformers reads and writes LARP tokens.

    import larp_mllm
    larp_mllm.generate("a person surfing").save("surfing.mp4")

Names are loaded when they are first used, so that `import larp_mllm` stays light.
"""

from importlib import import_module

import larp  # noqa: F401  (before torch: it sets how torch's threads wait)
from larp_mllm.registration import register

_HOMES = {
    "generate": "generation",
    "describe": "generation",
    "continue_video": "generation",
    "chat": "generation",
    "Mllm": "mllm",
    "Video": "video",
    "VideoSampling": "sampling",
    "TextSampling": "sampling",
    "Progress": "progress",
    "LarpMllmConfig": "configuration",
    "LarpMllmForCausalLM": "modeling",
    "LarpMllmProcessor": "processing",
    "Vocabulary": "vocabulary",
}

__all__ = sorted(_HOMES)

register()


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
