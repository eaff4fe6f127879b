"""Endless, shuffled batches for training, which go on exactly where an interrupted run stopped.

    shards ---.
               > samples of one worker -> skip what was seen -> decode, crop, tokenize -> batches
    memory ---'

The order of the samples and the augmentation of each follow from the seed alone, so all that a checkpoint needs is how
far every worker has come. Each batch carries that, and what its worker had to skip on the way.
"""

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import webdataset
from clip_data import CaptionedImages
from clip_images import EncodedCrop, EncodedCrops, RandomCrop, collate
from clip_shards import Pair, RawSample, Report, raw_samples, read_pair
from torch import Tensor
from user_errors import UserError


class Source(Protocol):
    """Where samples come from. `consumer` of `consumers` (all workers of all processes) gets its own ones."""

    def samples(self, epoch: int, consumer: int, consumers: int, report: Report) -> Iterator[Any]:
        """One pass over the data, in an order that depends on the seed and `epoch` only."""

    def parse(self, raw: Any) -> Pair:
        """Image and captions of one of them; ValueError if it lacks either."""


@dataclass(frozen=True)
class Shards:
    """Samples of WebDataset shards.

    The shards are shuffled anew for every pass and dealt out to the consumers; where there are fewer shards than
    consumers, everyone reads all of them and takes every n-th sample.

    Args:
        shards: single shards, see `clip_shards.expand`.
        shuffle: so many samples wait in the buffer from which each worker draws the next one.
        resampled: draw shards with replacement, so that no consumer waits for another at the end of a pass over shards
            of unequal length; a pass then misses some samples and repeats others.
    """

    shards: Sequence[str]
    seed: int
    shuffle: int = 5000
    resampled: bool = False

    def samples(self, epoch: int, consumer: int, consumers: int, report: Report) -> Iterator[RawSample]:
        order = random.Random(f"{self.seed} shards {epoch}")
        own = random.Random(f"{self.seed} samples {epoch} {consumer}")
        shards = list(self.shards)
        order.shuffle(shards)
        every, first = 1, 0
        if self.resampled:
            shards = own.choices(self.shards, k=-(-len(shards) // consumers))
        elif len(shards) >= consumers:
            shards = shards[consumer::consumers]
        else:
            every, first = consumers, consumer
        found = itertools.islice(raw_samples(shards, report), first, None, every)
        return iter(webdataset.shuffle(self.shuffle, initial=self.shuffle, rng=own)(found))

    def parse(self, raw: RawSample) -> Pair:
        return read_pair(raw)


@dataclass(frozen=True)
class Memory:
    """Samples of a small set that lies in memory."""

    data: CaptionedImages
    seed: int

    def samples(self, epoch: int, consumer: int, consumers: int, report: Report) -> Iterator[int]:
        rows = list(range(len(self.data)))
        random.Random(f"{self.seed} rows {epoch}").shuffle(rows)
        return iter(rows[consumer::consumers])

    def parse(self, raw: int) -> Pair:
        captions = self.data.all_captions[raw] if self.data.all_captions else [self.data.captions[raw]]
        return Pair(self.data.images[raw], list(captions), f"image {raw}")


class Batch(NamedTuple):
    """What a model takes, and where the reading stands.

    Args:
        images: (B, 3, H, W) uint8, or what `clip_images.decode_on` makes that of.
        tokens: (B, L) int64.
        worker: that made the batch.
        position: pass over the data, and samples of this pass that the worker has taken so far.
        skipped: a sentence for everything that the worker skipped since its last batch.
    """

    images: Tensor | EncodedCrops
    tokens: Tensor
    worker: int
    position: tuple[int, int]
    skipped: list[str]


@dataclass
class Progress:
    """How far a process has come in its data: all that a checkpoint needs.

    Args:
        batches: taken so far.
        positions: of every worker, see `Batch.position`.
        skipped: so many shards and samples were broken.
    """

    batches: int = 0
    positions: dict[int, tuple[int, int]] = field(default_factory=dict)
    skipped: int = 0

    def take(self, batch: Batch) -> None:
        self.batches += 1
        self.positions[batch.worker] = batch.position
        self.skipped += len(batch.skipped)


class CaptionStream(torch.utils.data.IterableDataset[Batch]):
    """The batches of one process, for a `DataLoader` with `batch_size=None`, from `progress` on.

    Args:
        crop: what becomes of an image; draws from torch's generator.
        tokenize: a list of strings to (B, L) int64; gets one at a time, and may draw from torch's and Python's
            generators.
        random_captions: take any of an image's captions instead of its first one.
    """

    def __init__(
        self,
        source: Source,
        crop: RandomCrop,
        tokenize: Callable[[list[str]], Tensor],
        *,
        batch_size: int,
        seed: int,
        random_captions: bool = False,
        rank: int = 0,
        world_size: int = 1,
        progress: Progress | None = None,
    ) -> None:
        self.source = source
        self.crop = crop
        self.tokenize = tokenize
        self.batch_size = batch_size
        self.seed = seed
        self.random_captions = random_captions
        self.rank = rank
        self.world_size = world_size
        self.progress = progress or Progress()

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        # A loader asks its workers in turn, beginning with the first: that one must be whoever is next.
        worker = (worker + self.progress.batches) % num_workers
        consumer, consumers = self.rank * num_workers + worker, self.world_size * num_workers
        first_epoch, seen = self.progress.positions.get(worker, (0, 0))
        pairs: list[tuple[Tensor | EncodedCrop, Tensor, str]] = []
        skipped: list[str] = []
        taken = 0

        def report(problem: str) -> None:
            if taken >= seen:  # else it was reported before the interruption
                skipped.append(problem)

        for epoch in itertools.count(first_epoch):
            taken, complete = 0, seen
            for raw in self.source.samples(epoch, consumer, consumers, report):
                taken += 1
                if taken <= seen:
                    continue
                try:
                    pairs.append(self._prepare(raw, f"{self.seed} {epoch} {consumer} {taken}"))
                except ValueError as error:
                    skipped.append(str(error))
                    continue
                complete += 1
                if len(pairs) == self.batch_size:
                    images, tokens, places = zip(*pairs, strict=True)
                    batch = collate(images, places, self.crop.shape)
                    yield Batch(batch, torch.stack(tokens), worker, (epoch, taken), skipped)
                    pairs, skipped = [], []
            if complete == 0:
                cause = f"; for example {skipped[-1]}" if skipped else ""
                raise UserError(
                    f"reader {consumer + 1} of {consumers} found no complete image-text pair in a whole pass over its "
                    f"data: check the shards, or take fewer workers{cause}"
                )
            seen = 0

    def _prepare(self, raw: Any, seed: str) -> tuple[Tensor | EncodedCrop, Tensor, str]:
        """Crop and tokens of a sample, with random numbers of its own, and its place."""
        pair = self.source.parse(raw)
        own = random.Random(seed)
        caption = own.choice(pair.captions) if self.random_captions else pair.captions[0]
        with _drawing_from(own):
            try:
                image = self.crop(pair.image)
            except ValueError as error:
                raise ValueError(f"{pair.place}: {error}") from error
            tokens = self.tokenize([caption])[0]
        return image, tokens, pair.place


@contextlib.contextmanager
def _drawing_from(own: random.Random) -> Iterator[None]:
    """torch's and Python's generators begin with seeds of `own`, and are afterwards what they were."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(own.getrandbits(63))  # and not CUDA's, from which masks are drawn
        random.seed(own.getrandbits(63))
        try:
            yield
        finally:
            random.setstate(state)


def open_loader(stream: CaptionStream, *, workers: int, prefetch: int = 2, pin: bool = False) -> Any:
    """The batches of `stream`, made by other processes ahead of time.

    Args:
        workers: so many processes; 0 makes every batch when it is asked for.
        prefetch: batches that every worker may be ahead.
        pin: hand over pinned memory, from which a GPU copies while it computes.
    """
    return torch.utils.data.DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin,
        generator=torch.Generator(),  # of its own, so that it draws nothing from the masks' one
    )
