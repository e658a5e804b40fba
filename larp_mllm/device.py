"""Where models run: the device that was asked for, else the GPU if there is one."""

import torch


def choose_device(device: str | None = None) -> str:
    """Return `device`, or by default the GPU if there is one. ValueError as `check_device`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return device


def check_device(device: str | torch.device) -> None:
    """ValueError unless torch can put a tensor on the device and read it back."""
    try:
        torch.zeros(1, device=device).tolist()
    except Exception as error:  # a family of its own for each way in which a device can be absent
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"device {str(device)!r} cannot be used here: {reason}. Give cpu, cuda or cuda:N of a GPU that torch sees "
            f"(it sees {torch.cuda.device_count()}), or leave it out"
        ) from error
