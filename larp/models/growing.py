"""A trained tokenizer with more codes for a clip, or with a refiner, as the start of a training."""

from __future__ import annotations

from dataclasses import replace

from larp.models.layers import sincos_1d
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

import torch

# Of a query's standard deviation: twins must differ, or they stay the same. Of eight clips of UCF-101 this costs nothing that shows.
_SPREAD = 0.5


def grown(trained: LarpTokenizer, config: TokenizerConfig) -> LarpTokenizer:
    """Return `trained` with as many codes as `config` says, if these are a multiple of its own, and with a refiner if it lacks one."""
    if not config.num_tokens % trained.num_tokens:
        trained = with_more_codes(trained, config.num_tokens)
    return with_refiner(trained, config.refiner_width) if config.refiner_width and trained.refiner is None else trained


def with_refiner(trained: LarpTokenizer, width: int) -> LarpTokenizer:
    """Return a tokenizer that draws what `trained`, which has no refiner, draws: its refiner changes nothing yet."""
    new = LarpTokenizer(replace(trained.config, refiner_width=width))
    new.load_state_dict(new.state_dict() | trained.state_dict())
    return new.to(trained.device)


def with_more_codes(trained: LarpTokenizer, num_tokens: int, seed: int = 0) -> LarpTokenizer:
    """Return a tokenizer of `num_tokens` codes that draws nearly what `trained` draws: each query becomes several neighbours.

    Their positions in the decoder divide the distance to the next trained query. The new one has no prior, since that of `trained` predicts
    another sequence; for the same number of codes `trained` itself is returned. Raises ValueError for other than a multiple of its codes.
    """
    config = trained.config
    if num_tokens == config.num_tokens:
        return trained
    times, rest = divmod(num_tokens, config.num_tokens)
    if rest or not times:
        raise ValueError(
            f"a tokenizer of {config.num_tokens} codes cannot become one of {num_tokens}: choose a multiple of {config.num_tokens}"
        )
    grown = LarpTokenizer(replace(config, num_tokens=num_tokens, prior=replace(config.prior, enabled=False)))
    state = {name: tensor for name, tensor in trained.state_dict().items() if not name.startswith("prior.")}
    queries = state["queries"].repeat_interleave(times, dim=0)
    noise = torch.randn(queries.shape, generator=torch.Generator().manual_seed(seed)).to(queries)
    state["queries"] = queries + _SPREAD * queries.std() * noise
    places = torch.arange(num_tokens, dtype=torch.float64) / times
    state["latent_positions"] = sincos_1d(num_tokens, config.decoder_width, places)[None].to(state["latent_positions"])
    grown.load_state_dict(state)
    return grown.to(queries.device)
