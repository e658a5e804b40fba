"""A training that begins with the weights of a trained model."""

from __future__ import annotations

from collections.abc import Collection

from larp.config import to_dict
from larp.engine.state import differences
from larp.hub import EMA, LarpModel, resolve, weights_file


def take_weights(model: LarpModel, source: str, free: Collection[str] = ()) -> None:
    """Put the weights of a trained model into a fresh one, averaged ones where it has them.

    source: folder or hub name. free: names of fields of the config that may differ. Raises ValueError that names the others
    that do.
    """
    folder = resolve(source)
    variant = EMA if (folder / weights_file(EMA)).exists() else None
    trained = type(model).from_pretrained(folder, variant=variant)
    configs = [{k: v for k, v in to_dict(m.config).items() if k not in free} for m in (trained, model)]
    if differing := differences(*configs):
        raise ValueError(f"start_from {source} is another model than this run's: {'; '.join(differing)}")
    model.load_state_dict(trained.state_dict())
