"""`python -m larp_mllm.cli` is the command larp-mllm."""

from larp_mllm.cli import main

main()
