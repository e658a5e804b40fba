"""The weights of a trained model as the start of a training (`--start-from`)."""

from __future__ import annotations

from collections.abc import Callable, Collection

from larp.config import to_dict
from larp.engine.checkpoint import differences
from larp.hub import LarpModel, averaged, resolve


def take_weights(
    model: LarpModel,
    source: str,
    free: Collection[str] = (),
    optional: str | None = None,
    fit: Callable[[LarpModel], LarpModel] = lambda trained: trained,
) -> None:
    """Load the weights of a trained model, the averaged ones if it has any, into a new model.

    Args:
        model: the new model.
        source: folder or hub name of the trained one.
        free: config fields that may differ; ValueError names any others that differ.
        optional: config field of a part that the trained model may lack; the new one's is then left as it is.
        fit: changes the trained model before it is compared.
    """
    folder = resolve(source)
    trained = fit(type(model).from_pretrained(folder, variant=averaged(folder)))
    if optional is not None and not getattr(trained.config, optional).enabled:
        free = (*free, optional)
    configs = [{k: v for k, v in to_dict(m.config).items() if k not in free} for m in (trained, model)]
    if differing := differences(*configs):
        raise ValueError(f"start_from {source} is another model than this run's: {'; '.join(differing)}")
    model.load_state_dict(model.state_dict() | trained.state_dict())
