"""Validation after each epoch: centre crops at S, or at the middle of the range (Sec. 3.2), shared out over the workers."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipelines.cache import DecodedCache
from pipelines.loader import TestLoader
from pipelines.manifest import Manifest
from pipelines.plan import share
from training.learner import Learner
from training.stage_job import StageJob
from training.team import Team

VAL_BATCH = 64                     # pictures a forward pass
VAL_CACHE_BYTES = 512 * 2**20      # views stay in memory below this, in each worker


class Validation:
    """This worker's share of the val split, and what the whole split says of a net."""

    def __init__(self, job: StageJob, manifest: Manifest, team: Team, cache: DecodedCache | None) -> None:
        """Reads nothing yet."""
        self.stage, self.team = job.stage, team
        self.pictures = manifest.split("val")
        self.loader = TestLoader(
            self.pictures,
            job.colour,
            standardise=job.stage.standardise,
            device=str(team.device),
            threads=job.threads,
            cache=cache,
            view=job.stage.view,
        )
        self.views: list[tuple[Tensor, Tensor]] | None = None     # once read, where they are small enough

    @torch.inference_mode()
    def measure(self, learner: Learner, heed: Callable[[], bool]) -> tuple[float, float] | None:
        """Top-1 accuracy (0..1) and mean loss on val; None when `heed`, asked by all workers before each batch, says stop."""
        learner.net.eval()
        correct, loss_sum = 0, 0.0
        coming = self.share_of_val()
        longest = share(len(self.pictures.paths), 0, self.team.world_size)[1]
        for _ in range(0, longest, VAL_BATCH):
            if heed():
                return None
            images, labels = next(coming, (None, None))
            if images is None or labels is None:       # others' shares are one picture longer
                continue
            with learner.autocast():
                logits = learner.net(learner.laid_out(images)).float()
            correct += int((logits.argmax(1) == labels).sum())
            loss_sum += float(cross_entropy(logits, labels, reduction="sum"))
        total_correct, total_loss = self.team.total(float(correct), loss_sum)
        return total_correct / len(self.pictures.paths), total_loss / len(self.pictures.paths)

    def share_of_val(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This worker's share in batches; kept in memory from the first whole pass on where it is small enough."""
        if self.views is not None:
            yield from self.views
            return
        start, stop = share(len(self.pictures.paths), self.team.rank, self.team.world_size)
        small = (stop - start) * 3 * self.stage.crop**2 * 4 <= VAL_CACHE_BYTES
        seen: list[tuple[Tensor, Tensor]] = []
        if stop > start:
            for images, labels, _ in self.loader.centre(self.stage.middle_scale, self.stage.crop, VAL_BATCH, start, stop):
                if small:
                    seen.append((images, labels))
                if small and sum(len(one) for _, one in seen) == stop - start:
                    self.views = seen
                yield images, labels

    def close(self) -> None:
        """Lets the loader's pipelines go."""
        self.loader.close()
