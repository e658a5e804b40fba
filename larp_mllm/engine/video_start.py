"""When an answer becomes a video: the head row of video_start, fitted after a training with partial LoRA.

The hidden states of text are those of the frozen base there, so the best row is the solution of a convex problem, found in
seconds. A training of a few hundred steps sees each question once or twice: it left nine of forty other messages answered
with a video, the fitted row none (LOG.md).
"""

from collections.abc import Collection

from larp_mllm.data.dataset import REQUESTS
from larp_mllm.data.records import RecordSet
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.model.vocabulary import IGNORE
from larp_mllm.pipeline import Mllm

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

_CAPTIONS = 12  # for each form of a request
# Of the squared length of the row, in units of the hidden states. Chosen by cross-validation over questions and forms of requests.
_DECAY = 1e-5


@torch.no_grad()
def fit_video_start(mllm: Mllm, answers: RecordSet, captions: Collection[str]) -> None:
    """Replace the head row: a video follows requests for these captions, and no place of the base's own answers.

    answers: of `larp_mllm.engine.own_answers`.
    """
    model, texts = mllm.model, sorted(captions)
    training = model.training
    model.eval()
    asked = [
        form.format(texts[(number + place * len(texts) // _CAPTIONS) % len(texts)])
        for number, form in enumerate(REQUESTS)
        for place in range(min(_CAPTIONS, len(texts)))
    ]
    requests = [torch.tensor(mllm.chat_prompt([{"role": "user", "content": text}])) for text in asked]
    wanted = [_states(model, ids, torch.tensor([len(ids) - 1])) for ids in tqdm(requests, desc="requests", delay=2)]
    others = []
    for number in tqdm(range(len(answers)), desc="own answers", delay=2):
        sequence = answers[number]
        others.append(_states(model, sequence.ids, (sequence.labels[1:] != IGNORE).nonzero()[:, 0]))
    model.train(training)
    # Most decisions fall at the first word of an answer: these places weigh as much as all later ones together.
    groups = [(wanted, 1.0), ([(h[:1], z[:1]) for h, z in others], -1.0), ([(h[1:], z[1:]) for h, z in others], -1.0)]
    row = _fit([(torch.cat([h for h, _ in found]), torch.cat([z for _, z in found]), sign) for found, sign in groups])
    model.adapter.control_output.weight[0].copy_(row)


def _states(model: LarpMllmForCausalLM, ids: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden states (n, H) at places of a sequence, and the log-sum-exp (n,) of the logits of text there, float32."""
    hidden = model.run_base(ids[None].to(model.device), use_cache=False).last_hidden_state[0, places.to(model.device)]
    return hidden.float(), model.base.get_output_embeddings()(hidden).float().logsumexp(-1)


def _fit(groups: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Return the row (H,) that minimises the logistic loss, the mean of each group counting alike.

    groups: hidden states, log-sum-exp of the other logits, and 1.0 where a video is wanted, else -1.0.
    """
    first = groups[0][0]
    row = torch.zeros_like(first[0], requires_grad=True)
    decay = _DECAY * first.norm(dim=-1).mean() ** 2 / len(row)
    optimizer = torch.optim.LBFGS([row], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        losses = [F.softplus(-sign * (hidden @ row - others)).mean() for hidden, others, sign in groups if len(hidden)]
        total = sum(losses) + decay * row.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return row.detach()
