"""The workers of a stage as one of them sees them: its rank, how many they are, and what they agree on."""

import torch
import torch.distributed

from vggcore.errors import VggrowError


class Team:
    """The workers of a stage: this one's rank, how many there are, and what they agree on."""

    def __init__(self, device: torch.device) -> None:
        """Reads rank and world size from torch.distributed; one worker alone needs no process group."""
        alone = not torch.distributed.is_initialized()
        self.rank = 0 if alone else torch.distributed.get_rank()
        self.world_size = 1 if alone else torch.distributed.get_world_size()
        self.device = device

    def total(self, *values: float) -> list[float]:
        """The sums over all workers, in float64; every worker gets the same bits."""
        if self.world_size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(summed)
        return summed.tolist()

    def every(self, value: str) -> list[str]:
        """What each worker has, by rank."""
        if self.world_size == 1:
            return [value]
        found: list[str] = [""] * self.world_size
        torch.distributed.all_gather_object(found, value)
        return found

    def any_problem(self, problem: VggrowError | None) -> VggrowError | None:
        """The first worker's problem, the same in every worker; None when all are well."""
        if self.world_size == 1:
            return problem
        found: list[VggrowError | None] = [None] * self.world_size
        torch.distributed.all_gather_object(found, problem)
        return next((one for one in found if one is not None), None)
