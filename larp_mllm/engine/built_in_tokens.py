"""Tokens of the built-in captioned videos, for a training that was given none."""

import os
import subprocess
import sys
import time
from pathlib import Path

from larp.engine import signals
from larp.engine.distributed import RANK_VARIABLES
from larp.models.tokenizer import LarpTokenizer

_AT_HAND = (Path("runs/tokenizer/model"), Path("runs/quickstart/tokenizer/model"))
"""Where train_tokenizer.py and the quickstart leave a tokenizer; the first is made if there is none."""

_LAUNCHER = (*RANK_VARIABLES, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMP_NUM_THREADS")


def make_built_in_tokens(scripts: Path, folder: Path, tokenizer: str | None) -> None:
    """Encode the built-in captioned videos into a token cache, with a tokenizer that is trained first if none is at hand.

    Each step is a process of its own: a stopped one goes on when the same training is started again.

    Args:
        scripts: folder of train_tokenizer.py and extract_tokens.py.
        folder: of the cache.
        tokenizer: folder or hub name; None: the one at hand.

    Raises ValueError if a step fails or is asked to stop.
    """
    print(f"no tokens in {folder}: they are made of the built-in captioned videos (yours: training/extract_tokens.py)")
    if tokenizer is None:
        found = next((path for path in _AT_HAND if (path / "model.safetensors").is_file()), None)
        if found is None:
            run = _AT_HAND[0].parent
            _run(
                scripts / "train_tokenizer.py", "--out", run, *(["--resume"] if (run / "config.json").is_file() else [])
            )
        tokenizer = str(found or _AT_HAND[0])
    config = LarpTokenizer.from_pretrained(tokenizer).config
    data = f"shapes:size={config.height},frames={config.num_frames}"
    _run(scripts / "extract_tokens.py", "--tokenizer", tokenizer, "--data", data, "--out", folder)


def _run(script: Path, *options: object) -> None:
    """Run a script in one process on all cores; a signal to this process is passed on."""
    command = [str(word) for word in (sys.executable, script, *options)]
    print(f"== {' '.join(command[1:])}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    process = subprocess.Popen(command, env=environment)
    while process.poll() is None:
        if signals.stop_flag():
            process.terminate()
            process.wait()
            raise ValueError("stopped while the tokens were made; the same command goes on")
        time.sleep(0.2)
    if process.returncode:
        raise ValueError(
            f"{script.name} ended with status {process.returncode}: mend what it says above, and run the same command again"
        )
