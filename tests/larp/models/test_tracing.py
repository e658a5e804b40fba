"""torch.compile and torch.export of the tokenizer and of the generator's step: whole graphs, the same results."""

from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer, start_range_check
from larp.models.tokenizer_config import TokenizerConfig
from larp.sampling.decoder import Decoder

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Method(nn.Module):
    """A method of a model as a module."""

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x):
        return getattr(self.model, self.name)(x)


@pytest.fixture(scope="module")
def tokenizer() -> LarpTokenizer:
    torch.manual_seed(0)
    sides = {f"{side}_{n}": v for side in ("encoder", "decoder") for n, v in dict(width=32, depth=1, heads=4).items()}
    shape = dict(num_frames=4, height=16, width=16, patch_size=(2, 8, 8), num_tokens=6, codebook_size=32, code_dim=8)
    model = LarpTokenizer(TokenizerConfig(**shape, **sides, prior=PriorConfig(enabled=False), nested=True)).eval()
    nn.init.normal_(model.head.weight, std=0.05)
    return model


def inputs(tokenizer: LarpTokenizer, name: str, rows: int = 3) -> torch.Tensor:
    clip = torch.rand(rows, 3, 4, 16, 16, generator=torch.Generator().manual_seed(rows))
    return clip if name == "encode" else tokenizer.encode(clip)


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_the_tokenizer_compiles_as_one_graph(tokenizer, name):
    torch._dynamo.reset()
    method, x = getattr(tokenizer, name), inputs(tokenizer, name)
    assert torch.equal(torch.compile(method, fullgraph=True, backend="eager")(x), method(x))
    # The checks are as they were outside of the graph.
    with pytest.raises(ValueError, match=r"got values from|codes run from"):
        method(x + 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encode", "decode"])
def test_the_compiled_tokenizer_gives_the_same_results(tokenizer, name):
    torch._dynamo.reset()
    method, x = getattr(tokenizer, name), inputs(tokenizer, name)
    torch.testing.assert_close(torch.compile(method, fullgraph=True)(x), method(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_the_tokenizer_exports_for_any_batch(tokenizer, name):
    x = inputs(tokenizer, name)
    program = torch.export.export(Method(tokenizer, name), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for rows in (1, 5):
        x = inputs(tokenizer, name, rows)
        assert torch.equal(program.module()(x), getattr(tokenizer, name)(x))


class ReadBack(TorchDispatchMode):
    """Counts the values that are read from tensors one by one, each of which would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def test_the_bisection_for_a_psnr_reads_nothing_back(tokenizer):
    clip = inputs(tokenizer, "encode")
    codes = tokenizer.encode(clip)
    with ReadBack() as read:
        lengths = tokenizer.shortest_prefix(clip, codes, 20.0)
    assert read.count == 0 and lengths.shape == (3,)


def test_a_check_on_a_gpu_ends_after_the_work_that_follows_it(monkeypatch):
    """Numbers are copied behind the queued work, and the error comes from the function that ends the check."""
    order = []

    class Event:
        def synchronize(self):
            order.append("waited")

    class Stream:
        def record_event(self):
            order.append("copied")
            return Event()

    class OnGpu(torch.Tensor):
        is_cuda = True

    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, device, pin_memory: empty_like(x, device=device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    end_check = start_range_check(torch.tensor([0.5, 2.0]).as_subclass(OnGpu), 1, "from {:g} to {:g}")
    assert order == ["copied"]
    with pytest.raises(ValueError, match=r"from 0\.5 to 2"):
        end_check()
    assert order == ["copied", "waited"]


@pytest.fixture(scope="module")
def generator() -> LarpGenerator:
    torch.manual_seed(0)
    model = LarpGenerator(GeneratorConfig(num_tokens=14, codebook_size=32, depth=2, heads=2, width=32, num_classes=3))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("weights", ["plain", "auto"])
@torch.no_grad()
def test_the_step_of_the_generator_compiles_once(generator, weights):
    torch._dynamo.reset()
    compiled = torch._dynamo.testing.CompileCounter()
    condition, codes = torch.tensor([0, 2]), torch.arange(28).view(2, 14)
    decoder = Decoder(generator, 2, weights=weights)
    step = torch.compile(decoder.decode_one, fullgraph=True, backend=compiled)
    # More steps than torch compiles versions of a function; then two that are not compiled.
    logits = [decoder.prefill(condition)] + [step(codes[:, i]) for i in range(11)]
    logits += [decoder.decode_one(codes[:, i]) for i in (11, 12)]
    torch.testing.assert_close(torch.stack(logits, dim=1), generator(codes, condition), rtol=1e-4, atol=1e-5)
    assert compiled.frame_count == 1
    with pytest.raises(ValueError, match="all 14 positions of this generator are filled"):
        decoder.decode_one(codes[:, 13])
    for wrong in (codes[:1, 0], codes[:, :1], codes[:, 0].float()):
        with pytest.raises(ValueError, match=r"expected one code per row, integers \(2,\)"):
            decoder.decode_one(wrong)


@torch.no_grad()
def test_the_step_of_the_generator_exports(generator, tmp_path):
    condition, codes = torch.tensor([0, 2]), torch.arange(28).view(2, 14)
    decoder = Decoder(generator, 2, weights="plain")
    first = decoder.prefill(condition)
    torch.export.save(torch.export.export(decoder, (codes[:, 0],)), tmp_path / "step.pt2")
    step = torch.export.load(tmp_path / "step.pt2").module()
    logits = torch.stack([first] + [step(codes[:, i]) for i in range(13)], dim=1)
    torch.testing.assert_close(logits, generator(codes, condition), rtol=1e-4, atol=1e-5)
    # Exporting has not moved the decoder.
    torch.testing.assert_close(decoder.decode_one(codes[:, 0]), logits[:, 1])
