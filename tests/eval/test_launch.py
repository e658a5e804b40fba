"""Every script of eval/ starts from another working folder, with `larp` and `larp_mllm` installed and nothing else of the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(map(str, (ROOT / "eval").glob("*.py")))
PROGRAM = """
import runpy, sys
site, *scripts = sys.argv[1:]
for script in scripts:
    # As `python SCRIPT --help` does.
    sys.argv, sys.path[0] = [script, "--help"], script.rpartition("/")[0]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, script
import larp, larp_mllm
assert larp.__file__.startswith(site) and larp_mllm.__file__.startswith(site)
"""


@pytest.mark.slow
def test_every_script_starts_elsewhere(tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    site.mkdir()
    elsewhere.mkdir()
    for package in ("larp", "larp_mllm"):
        (site / package).symlink_to(ROOT / package)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(site), *SCRIPTS],
        cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("usage: ") == len(SCRIPTS) >= 13
    assert not list(elsewhere.iterdir())
