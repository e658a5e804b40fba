"""`python -m larp_mllm.cli` is larp-mllm."""

from larp_mllm.cli import main

main()
