"""Part loader: what one core delivers of the images that examples/train_clip.py trains on, stage by stage.

    read -> tokenize -> decode -> crop -> collate | copy

A worker does all of it but the copy (to the device, as floats), which is left to the training process. The photos are
stand-ins with the spectrum of natural images, or your own.
"""

import atexit
import functools
import io
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import open_clip
import webdataset
from clip_evaluation import HALF, to_floats
from clip_images import Box, EncodedCrops, RandomCrop, collate, cut_out, decode_on
from clip_shards import Pair, expand, raw_samples, read_pair
from clip_stream import CaptionStream, Shards
from measure.timing import Contender
from PIL import Image
from torch import Tensor

from part.groups import Group
from part.sizes import Sizes

STAGES = ("read", "tokenize", "decode", "crop", "collate", "copy")
WHOLE = "whole"  # what a worker does: all but the copy
BEFORE = "open_clip's transform"
FULL = "full"
DEVICE = "device"
ANYONE = "every loader"
SCALE = (0.5, 1.0)  # the crops of the GLIP recipe
CAPTION = "two dogs run over the wet grass behind a red ball while a child in a blue coat watches them from the path"
SECONDS_PER_IMAGE = 0.02  # that every contender costs in a round, for the progress bar


class ByOpenClip:
    """open_clip's transform in the place of a `RandomCrop`: PIL, and then floats."""

    def __init__(self, size: int) -> None:
        self.shape = [size, size]
        preprocessing = open_clip.transform.PreprocessCfg(size=size, mean=HALF, std=HALF)
        self.transform = open_clip.transform.image_transform_v2(
            preprocessing, is_train=True, aug_cfg={"scale": SCALE}
        )  # fmt: skip

    def open(self, file: bytes) -> tuple[Any]:
        return (Image.open(io.BytesIO(file)).convert("RGB"),)

    def cut_out(self, image: Image.Image) -> Tensor:
        found: Tensor = self.transform(image)
        return found

    def on(self, device: str, batch: Tensor) -> Tensor:
        return batch.to(device, non_blocking=True)

    def __call__(self, file: bytes) -> Tensor:
        return self.cut_out(*self.open(file))


class Cropped(RandomCrop):
    """A `RandomCrop` whose stages are called one by one."""

    def cut_out(self, image: Tensor, box: Box) -> Tensor:
        return cut_out(image, box, self.shape)

    def on(self, device: str, batch: Tensor) -> Tensor:
        return to_floats(decode_on(device, batch, print), device)


def loaders(size: int) -> dict[str, Any]:
    """What makes a crop of a file: as train_clip.py did at first, and as it does."""
    return {BEFORE: ByOpenClip(size), FULL: Cropped(size, SCALE), "reduced": Cropped(size, SCALE, "reduced")}


def photo(generator: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG of noise whose amplitudes fall as 1/f, as those of natural images do; about as many bytes as these."""
    across, down = np.fft.rfftfreq(width), np.fft.fftfreq(height)
    amplitude = 1 / np.maximum(np.hypot(down[:, None], across), 1 / max(width, height))
    grey = generator.normal(size=(height, width, 1))
    noise = grey + 0.4 * generator.normal(size=(height, width, 3))
    shades = np.fft.irfft2(np.fft.rfft2(noise, axes=(0, 1)) * amplitude[..., None], s=(height, width), axes=(0, 1))
    shades = shades / shades.std() * 45 + 120
    buffer = io.BytesIO()
    Image.fromarray(shades.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


@functools.cache
def photos(width: int, height: int, count: int) -> str:
    """A shard of them, which is gone when the program ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    generator = np.random.default_rng(0)
    with webdataset.TarWriter(f"{folder}/photos.tar") as writer:
        for number in range(count):
            image = photo(generator, width, height)
            writer.write({"__key__": f"{number:06d}", "jpg": image, "txt": CAPTION})
    return f"{folder}/photos.tar"


def pairs(shards: Sequence[str], count: int) -> list[Pair]:
    """The first `count` of them, from the beginning again where there are fewer."""
    found: list[Pair] = []
    while len(found) < count:
        before = len(found)
        for raw in raw_samples(shards, print):
            found.append(read_pair(raw))
            if len(found) == count:
                break
        if len(found) == before:
            raise ValueError(f"{shards[0]} holds no pairs")
    return found


def calls(
    loader: Any, shards: Sequence[str], samples: list[Pair], tokenize: Callable[[list[str]], Tensor], device: str
) -> dict[str, Callable[[], object]]:
    """What is timed in each stage; all but the first have what the stage before them leaves."""
    files = [sample.image for sample in samples]
    opened = [loader.open(file) for file in files]
    crops = [loader.cut_out(*parts) for parts in opened]
    shared = hand_over(crops, loader.shape)
    return {
        "read": lambda: pairs(shards, len(samples)),
        "tokenize": lambda: [tokenize(sample.captions[:1]) for sample in samples],
        "decode": lambda: deque(map(loader.open, files), maxlen=0),  # and none is kept, as in a worker
        "crop": lambda: [loader.cut_out(*parts) for parts in opened],
        "collate": lambda: hand_over(crops, loader.shape),
        "copy": lambda: loader.on(device, shared),
        WHOLE: whole(loader, shards, tokenize, len(samples)),
    }


def whole(
    loader: Any, shards: Sequence[str], tokenize: Callable[[list[str]], Tensor], batch: int
) -> Callable[[], object]:
    """What a worker does for a batch, its sending included."""
    stream = CaptionStream(Shards(shards, seed=0, shuffle=100), loader, tokenize, batch_size=batch, seed=0)
    batches: Iterator[Any] = iter(stream)
    return lambda: share(next(batches).images)


def share(images: Any) -> Any:
    """Where the training process sees it too."""
    (images.files if isinstance(images, EncodedCrops) else images).share_memory_()
    return images


def hand_over(crops: list[Tensor], shape: list[int]) -> Tensor:
    """A batch, in memory that the training process shares with its workers."""
    shared: Tensor = share(collate(crops, [""] * len(crops), shape))
    return shared


def contenders(find: Callable[[], list[str]], size: int, batch: int, stage: str, device: str) -> list[Contender]:
    """Every loader; one for all of them where they do the same."""
    shards = find()
    samples = pairs(shards, batch)
    tokenize = open_clip.SimpleTokenizer()
    own = {
        name: calls(loader, shards, samples, tokenize, device)[stage] for name, loader in loaders(size).items()
    }  # fmt: skip
    if stage in ("read", "tokenize"):
        own = {ANYONE: own[FULL]}
    if stage == WHOLE:  # and what is left where a GPU decodes
        own[DEVICE] = whole(RandomCrop(size, SCALE, "device"), shards, tokenize, batch)
    return [Contender(name, call, batch) for name, call in own.items()]


def groups(sizes: Sizes, *, photos_at: str | None, device: str, rounds: int) -> list[Group]:
    """A group for every stage of photos of every size.

    Args:
        photos_at: shards to read instead of stand-ins.
    """
    size, batch = sizes.loader.crop, sizes.loader.batch
    sources: dict[str, Callable[[], list[str]]] = {
        f"{width} x {height} px": functools.partial(stand_ins, width, height, batch)
        for width, height in sizes.loader.photos
    }
    if photos_at is not None:
        sources = {"photos of one's own": functools.partial(expand, photos_at)}
    found = []
    for source, find in sources.items():
        for stage in (*STAGES, WHOLE):
            keys: dict[str, Any] = {"part": "loader", "model": source, "dtype": "uint8", "mask_ratio": 0.0}
            keys |= {"mode": f"crops of {size} px, one core", "pass": stage}
            build = functools.partial(contenders, find, size, batch, stage, device)
            alone = stage in ("read", "tokenize")
            reference, baseline = (ANYONE, ANYONE) if alone else (FULL, BEFORE)
            seconds = (1 if alone else 3) * batch * SECONDS_PER_IMAGE
            found.append(Group(keys, build, reference, baseline, rounds, seconds, one_core=True))
    return found


def stand_ins(width: int, height: int, count: int) -> list[str]:
    return [photos(width, height, count)]
