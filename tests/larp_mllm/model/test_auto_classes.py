"""`import larp_mllm` registers its models with the Auto classes, before or after transformers is imported."""

import json
import subprocess
import sys
from pathlib import Path

from larp_mllm.model import auto_classes
from larp_mllm.model.auto_classes import register
from tests.larp_mllm.tiny import tiny_mllm

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
ORDERS = {
    "larp_mllm first": "import larp_mllm\nfrom transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor",
    "transformers first": "from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor\nimport larp_mllm",
    "only the config first": "from transformers import AutoConfig\nimport larp_mllm\n"
    "from transformers import AutoModelForCausalLM, AutoProcessor",
    "our bases first": "import larp_mllm.model.base_models\nfrom transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor",
    "our model first": "import larp_mllm.model.modeling\nfrom transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor",
}
LOAD = """
import sys, torch
config = AutoConfig.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
print([type(loaded).__name__ for loaded in (config, model, processor)], file=sys.stderr)
print(model(torch.tensor([[1, 2, config.text_size, config.text_size + 2]])).logits.double().tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_the_auto_classes_load_a_saved_model_in_any_order_of_imports(order, tmp_path):
    mllm = tiny_mllm()
    mllm.save(tmp_path)
    command = [sys.executable, "-W", "error::UserWarning", "-c", ORDERS[order] + LOAD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "['LarpMllmConfig', 'LarpMllmForCausalLM', 'LarpMllmProcessor']" in done.stderr
    first = mllm.model.config.text_size
    expected = mllm.model(torch.tensor([[1, 2, first, first + 2]])).logits
    assert torch.equal(torch.tensor(json.loads(done.stdout)), expected.double())


@pytest.fixture
def theirs_and_ours(tmp_path, monkeypatch):
    """The files of a module that stands for one of transformers, and of one that stands for ours."""
    names = ("standin_of_transformers", "standin_of_ours")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(auto_classes, "_EXTENDS", {names[0]: names[1]})
    files = [tmp_path / f"{name}.py" for name in names]
    files[0].write_text("value = 1\n")
    files[1].write_text("import standin_of_transformers\nseen = standin_of_transformers.value\n")
    yield files
    for name in names:
        sys.modules.pop(name, None)


def test_ours_is_imported_after_theirs(theirs_and_ours):
    register()
    assert "standin_of_ours" not in sys.modules
    import standin_of_transformers

    assert standin_of_transformers.__spec__.origin == str(theirs_and_ours[0])
    assert sys.modules["standin_of_ours"].seen == 1


def test_ours_is_imported_at_once_if_theirs_is_loaded(theirs_and_ours):
    import standin_of_transformers  # noqa: F401

    sys.modules.pop("standin_of_ours", None)
    register()
    assert sys.modules["standin_of_ours"].seen == 1


def test_transformers_stays_usable_if_ours_cannot_be_imported(theirs_and_ours):
    theirs_and_ours[1].write_text("raise RuntimeError('no such luck')\n")
    register()
    with pytest.warns(UserWarning, match=r"standin_of_ours cannot be imported \(RuntimeError: no such luck\)"):
        import standin_of_transformers
    assert standin_of_transformers.value == 1


def test_registering_again_changes_nothing():
    before = list(sys.meta_path)
    register()
    assert sys.meta_path == before
