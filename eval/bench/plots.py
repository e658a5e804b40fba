"""Plots in files, where matplotlib is installed (extra `plots`)."""

from types import ModuleType


def open_pyplot() -> ModuleType | None:
    """Return matplotlib's pyplot, which draws into files; None, and a line that says so, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install 'larp-mllm[plots]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
