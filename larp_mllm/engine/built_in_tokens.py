"""Tokens of the built-in captioned videos, for a training that was given none."""

import os
import subprocess
import sys
import time
from pathlib import Path

from larp.engine import signals
from larp.engine.distributed import RANK_VARIABLES
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.locate import shipped

COUNT = 1536
"""Videos that the tokenizer that comes with the package encodes: about two minutes of two CPU cores."""

_LAUNCHER = (*RANK_VARIABLES, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMP_NUM_THREADS")


def make_built_in_tokens(script: Path, folder: Path, tokenizer: str | None) -> None:
    """Encode the built-in captioned videos into a token cache, in a process of its own on all cores.

    A stopped one goes on when the same training is started again; a signal to this process is passed on.

    Args:
        script: extract_tokens.py.
        folder: of the cache.
        tokenizer: folder or hub name; None: the one that comes with the package, and `COUNT` videos.

    Raises ValueError if the process fails or is asked to stop.
    """
    print(f"no tokens in {folder}: they are made of the built-in captioned videos (yours: training/extract_tokens.py)")
    source = tokenizer or str(shipped("tokenizer"))
    config = LarpTokenizer.from_pretrained(source).config
    data = f"shapes:size={config.height},frames={config.num_frames}" + ("" if tokenizer else f",count={COUNT}")
    command = [sys.executable, str(script), "--tokenizer", source, "--data", data, "--out", str(folder)]
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
