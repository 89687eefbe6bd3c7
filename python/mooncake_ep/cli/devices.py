"""The arrays of a rank on its device: NumPy's on the CPU, or torch's; bits stay the same."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import ml_dtypes

if TYPE_CHECKING:
    import numpy.typing as npt

    from mooncake_ep import Group

# By name in NumPy and torch: types that the other side has only as integers of this name.
_INTEGERS = {"bfloat16": "int16", "float8_e4m3fn": "uint8"}


class Host:
    """The CPU: arrays are there already."""

    def put(self, array: npt.NDArray[Any]) -> Any:
        """Return what the library gets."""
        return array

    def take(self, array: Any) -> npt.NDArray[Any]:
        """Return what the library gave as NumPy."""
        taken: npt.NDArray[Any] = array
        return taken


class Torch:
    """The CPU by torch."""

    def __init__(self) -> None:
        """Choose the CPU."""
        # torch is optional, so its types are not known everywhere.
        self.torch: Any = importlib.import_module("torch")
        self._device = self.torch.device("cpu")

    def put(self, array: npt.NDArray[Any]) -> Any:
        """Copy to the device."""
        name = array.dtype.name
        if name not in _INTEGERS:
            return self.torch.from_numpy(array).to(self._device)
        integers = self.torch.from_numpy(array.view(_INTEGERS[name]))
        return integers.to(self._device).view(getattr(self.torch, name))

    def take(self, array: Any) -> npt.NDArray[Any]:
        """Wait for the current stream, and copy to NumPy."""
        name = str(array.dtype).removeprefix("torch.")
        if name not in _INTEGERS:
            taken: npt.NDArray[Any] = array.cpu().numpy()
            return taken
        integers = array.view(getattr(self.torch, _INTEGERS[name])).cpu().numpy()
        typed: npt.NDArray[Any] = integers.view(getattr(ml_dtypes, name))
        return typed


class Gpu(Torch):
    """The GPU of one rank, by torch."""

    def __init__(self, device_id: int) -> None:
        """Make it torch's current device."""
        super().__init__()
        self.torch.cuda.set_device(device_id)
        self._device = self.torch.device("cuda", device_id)


def device_of(group: Group) -> Host | Gpu:
    """Return the device of this rank."""
    return Host() if group.backend == "cpu" else Gpu(group.device_id)
