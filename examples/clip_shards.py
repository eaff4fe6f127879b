"""WebDataset shards of image-text pairs: what lies in them, sample by sample; what is broken is reported.

A sample is `KEY.jpg` (or .jpeg, .png, .webp), `KEY.txt` with its caption, and optionally `KEY.cls` with the number of
its class and `KEY.json` with all of its `"captions"`.
"""

import glob
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import webdataset
from PIL import Image
from tqdm import tqdm

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
RawSample = Mapping[str, Any]  # bytes by suffix, and webdataset's own `__key__` and `__url__`
Report = Callable[[str], None]


class Sample(NamedTuple):
    """An RGB image, its captions (at least one), and the number of its class, if it has one."""

    image: Image.Image
    captions: list[str]
    label: int | None


class Pair(NamedTuple):
    """An image (a file, or uint8 (3, H, W)), its captions (at least one), and where it was found."""

    image: Any
    captions: list[str]
    place: str


def expand(shards: str | Sequence[str]) -> list[str]:
    """The single shards of `"a-{000..012}.tar"`, `"folder/*.tar"`, `"one.tar::two.tar"`, URLs, or a list of these.

    Raises:
        FileNotFoundError: when a local shard is missing, or a pattern matches nothing.
    """
    found: list[str] = []
    for shard in webdataset.shardlists.expand_urls(shards):
        if is_local(shard) and glob.has_magic(shard) and not Path(shard).exists():
            matches = sorted(glob.glob(shard))
            if not matches:
                raise FileNotFoundError(f"no shard matches {shard}")
            found += matches
        elif is_local(shard) and not Path(shard).is_file():
            raise FileNotFoundError(f"there is no shard {shard}")
        else:
            found.append(shard)
    return found


def is_local(shard: str) -> bool:
    """Whether it is a file, and not `pipe:...` or a URL."""
    return not shard.startswith("pipe:") and "://" not in shard


def raw_samples(shards: Sequence[str], report: Report) -> Iterator[RawSample]:
    """Every sample of every shard as bytes, not looked at yet.

    Each shard is read by itself, so that a broken one ends where it breaks, and nothing of it mixes with the next.

    Args:
        report: is called with a sentence for every shard that can't be opened or read to its end.
    """

    failed = False

    def skip(error: Exception) -> bool:
        nonlocal failed
        failed = True
        report(f"{shard}: {error.args[0] if error.args else type(error).__name__}")
        return True

    for shard in shards:
        failed = False
        try:
            with webdataset.gopen(shard) as stream:
                files = webdataset.tariterators.tar_file_expander([{"url": shard, "stream": stream}], handler=skip)
                yield from webdataset.tariterators.group_by_keys(files, handler=skip)
        except OSError as error:  # of opening it, or of a pipe that ended with an error
            if not failed:  # else it is the end of what was reported
                skip(error)


def read_pair(raw: RawSample) -> Pair:
    """One sample, its image not decoded.

    Raises:
        ValueError: when it lacks an image or a caption. The message names the sample.
    """
    place = f"{raw.get('__url__')}, sample {raw.get('__key__')}"
    image = next((raw[suffix] for suffix in IMAGE_SUFFIXES if suffix in raw), None)
    if image is None:
        raise ValueError(f"{place}: no image")
    try:
        captions = [caption for caption in captions_of(raw) if caption]
    except Exception as error:  # whatever is raised on bytes that are not what they should be
        raise ValueError(f"{place}: {error}") from error
    if not captions:
        raise ValueError(f"{place}: no caption")
    return Pair(image, captions, place)


def parse(raw: RawSample) -> Sample:
    """Decode one sample.

    Raises:
        ValueError: when it lacks an image or a caption, or they can't be decoded. The message names the sample.
    """
    pair = read_pair(raw)
    try:
        label = int(raw["cls"]) if "cls" in raw else None
        return Sample(Image.open(io.BytesIO(pair.image)).convert("RGB"), pair.captions, label)
    except Exception as error:  # as in read_pair
        raise ValueError(f"{pair.place}: {error}") from error


def captions_of(raw: RawSample) -> list[str]:
    several = json.loads(raw["json"]).get("captions", []) if "json" in raw else []
    texts = several or ([raw["txt"].decode()] if "txt" in raw else [])
    return [text.strip() for text in texts]


def count_samples(shards: Sequence[str]) -> int:
    """How many samples with an image local shards hold.

    A `sizes.json` beside them, as open_clip reads it (`{"00000.tar": 9871, ...}`), saves the reading.
    """
    known: dict[str, int] = {}
    for folder in {Path(shard).parent for shard in shards}:
        sizes = folder / "sizes.json"
        if sizes.is_file():
            known |= {str(folder / name): int(size) for name, size in json.loads(sizes.read_text()).items()}
    count = 0
    for shard in tqdm(shards, desc="counting samples", unit=" shards", delay=1, disable=None):
        count += known[shard] if shard in known else _count_images(shard)
    return count


def _count_images(shard: str) -> int:
    count = 0
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                count += member.name.rpartition(".")[2].lower() in IMAGE_SUFFIXES
    except (tarfile.TarError, EOFError, OSError):  # a broken shard counts as far as it can be read
        pass
    return count
