"""A trained tokenizer with more codes for a clip, as the start of a training."""

from __future__ import annotations

from dataclasses import replace

from larp.models.layers import sincos_1d
from larp.models.tokenizer import LarpTokenizer

import torch

# Of a query's standard deviation: twins must differ, or they stay the same. Of eight clips of UCF-101 this costs nothing that shows.
_SPREAD = 0.5


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
