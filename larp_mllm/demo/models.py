"""The models of the page: where they are found, what a tab says where one is missing, and each loaded once, at first use.

What is trained while the page is open is shown and used from then on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from larp.engine.generator_run import FPS, find_training
from larp.hub import choose_device, resolve
from larp.models.generator import LarpGenerator
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.api import open_model
from larp_mllm.locate import (
    find_generator,
    find_model,
    find_tokenizer,
    is_shipped,
    load_generator_tokenizer,
    read_config,
)
from larp_mllm.pipeline import Mllm


@dataclass
class Models:
    """The language model, the tokenizer and the generator of a page.

    A property loads its model at the first use and raises ValueError, each time, where it cannot.
    """

    model: str | None = None
    """Folder or hub name of a language model; None: as `larp_mllm.generate` finds it."""
    tokenizer: str | None = None
    """Folder or hub name of a tokenizer; None: as `larp-mllm reconstruct` finds it, or that of `model` if it is named."""
    generator: str | None = None
    """Folder or hub name of a class-conditional generator; None: the newest one trained here, else the one that comes with the
    package."""
    device: str | None = None
    dtype: str | None = None
    _loaded: dict[str, tuple[Any, Any]] = field(default_factory=dict, init=False, repr=False)

    def check(self) -> None:
        """Raise ValueError if a model that was named is not there. Nothing is loaded."""
        if self.model is not None:
            find_model(self.model, "--model")
        if self.tokenizer is not None:
            resolve(find_tokenizer(self.tokenizer))
        if self.generator is not None:
            resolve(self.generator)

    @property
    def mllm(self) -> Mllm:
        """The language model with its processor, which `open_model` keeps."""
        return open_model(self.model, self.device, self.dtype)

    @property
    def codec(self) -> LarpTokenizer:
        """The tokenizer of the tab that reconstructs."""
        return self._once("codec", self._codec_folder(), LarpTokenizer.from_pretrained)

    @property
    def classes(self) -> tuple[LarpGenerator, LarpTokenizer, float]:
        """The generator, its tokenizer, and the frames per second of its clips."""

        def load(folder: str, device) -> tuple[LarpGenerator, LarpTokenizer, float]:
            training, generator = find_training(folder), LarpGenerator.from_pretrained(folder, device=device)
            tokenizer = load_generator_tokenizer(folder, generator, training, self.tokenizer, device=device)
            return generator, tokenizer, training.fps or FPS

        return self._once("classes", find_generator(self.generator), load)

    def about(self) -> str:
        """Which models the page uses, in Markdown."""
        places = {
            "Language model": lambda: find_model(self.model),
            "tokenizer": self._codec_folder,
            "generator": lambda: find_generator(self.generator),
        }
        return " · ".join(f"{name}: {_shown(place)}" for name, place in places.items())

    def missing_mllm(self) -> str:
        """Why there is no language model, and the command that makes one; empty if there is one."""
        try:
            find_model(self.model)
        except ValueError as error:
            reason = str(error).split(". ")[0]
            return f"This tab needs a language model, but {reason}: `make quickstart` trains one; then reload the page."
        return ""

    def missing_continuation(self) -> str:
        """Why no video can be continued, and the command that changes it; empty if videos can be continued."""
        if missing := self.missing_mllm():
            return missing
        if (read_config(find_model(self.model) / "config.json") or {}).get("given_frames", 0) > 0:
            return ""
        return (
            "This language model is not trained for continuation: train one on tokens of "
            "`python training/extract_tokens.py --condition-frames 5`, with the task continuation."
        )

    def missing_classes(self) -> str:
        """Why no class can be sampled, and the command that makes a generator; empty if there is one for classes."""
        try:
            if self._generator_config().get("task") != "class":
                return (
                    f"{self.generator} continues given frames: `python training/train_generator.py --task class` trains a "
                    "generator for classes."
                )
        except ValueError as error:
            return f"This tab needs a generator, but {error}; then reload the page."
        return ""

    def class_names(self) -> list[str]:
        """The names of the generator's classes, or their numbers; none without a generator for classes."""
        if self.missing_classes():
            return []
        config = self._generator_config()
        return list(config.get("class_names") or map(str, range(config.get("num_classes", 0))))

    def prefix_lengths(self) -> int:
        """The largest number of codes that may be chosen for a window; 0 if the tokenizer is not nested."""
        try:
            config = read_config(resolve(self._codec_folder()) / "config.json") or {}
        except ValueError:  # the tab says so where the tokenizer is used
            return 0
        return config.get("num_tokens", 0) if config.get("nested") else 0

    def _once(self, name: str, folder: str, load: Callable[..., Any]) -> Any:
        """What `load` returns for a folder or hub name, kept until another one is asked for or its config.json is written anew."""
        config = resolve(folder).resolve() / "config.json"
        key = config, config.stat().st_mtime_ns if config.is_file() else None
        if self._loaded.get(name, (None,))[0] != key:
            self._loaded.pop(name, None)  # so that only one is in memory
            self._loaded[name] = key, load(folder, device=choose_device(self.device))
        return self._loaded[name][1]

    def _codec_folder(self) -> str:
        if self.tokenizer is not None:
            return find_tokenizer(self.tokenizer)
        return find_tokenizer(None if self.model is None else str(find_model(self.model)))

    def _generator_config(self) -> dict:
        return read_config(resolve(find_generator(self.generator)) / "config.json") or {}


def _shown(place: Callable[[], str | Path]) -> str:
    try:
        return "the one that comes with larp-mllm" if is_shipped(folder := place()) else f"`{folder}`"
    except ValueError:  # the tab says why
        return "none"
