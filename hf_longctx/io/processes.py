"""The processes that identify together: one, or those that ``accelerate launch`` or torchrun started."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModeError
from .launched import check_rank, launched

# How long one process may have work while another waits for it; the launcher ends those that wait for a dead one.
PATIENCE = timedelta(days=30)


class Processes:
    """This process among those with the whole model each.

    Attributes:
        rank, count: its number, and how many there are.

    Raises:
        ConfigError: as `launched` and `check_rank`.
        UnsupportedModeError: several were launched, and Accelerate was set up for one before.
    """

    def __init__(self, device: torch.device):
        """``device``: where the model is; the processes talk through it."""
        from accelerate import PartialState

        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        started = torch.distributed.get_world_size() if grouped else launched()
        self.rank = 0
        self.count = 1
        self._state = None
        if started > 1:
            if not grouped:
                check_rank(started)
            # Only now, because Accelerate keeps what it is first told, the device too, for the life of the process.
            self._state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
            self.rank = self._state.process_index
            self.count = self._state.num_processes
        if self.count != started:
            raise UnsupportedModeError(
                f"{started} processes were launched, but Accelerate was set up for {self.count} in this one, so they "
                "would all do the same. Set up no Accelerator before, or one for all of them (on CPUs: cpu=True)."
            )

    @property
    def main(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.rank == 0

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes, the same on each."""
        if self._state is None:
            return tensor
        from accelerate.utils import reduce

        return reduce(tensor.to(self._state.device), "mean").to(tensor.device)

    def wait(self) -> None:
        """Until all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def share(self, thing: Any) -> Any:
        """What the main process gave, on every process; it is pickled."""
        if self._state is None:
            return thing
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([thing])[0]

    def gather(self, thing: Any) -> list[Any]:
        """What each process gave, by rank, on every process; it is pickled."""
        if self._state is None:
            return [thing]
        from accelerate.utils import gather_object

        return gather_object([thing])
