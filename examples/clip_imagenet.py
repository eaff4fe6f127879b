"""ImageNet's classes and prompts as open_clip has them, and labelled images that are read while a model is evaluated.

50,000 images of 224 x 224 pixels are 7.5 GB, too much for the memory of every process: here each knows only where they
all lie, and its workers read those that it evaluates.
"""

import io
import itertools
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import open_clip
import torch
import torchvision
import webdataset
from clip_data import classnames_beside
from clip_shards import IMAGE_SUFFIXES, Report, expand, is_local
from open_clip.transform import PreprocessCfg
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor
from torchvision.transforms import v2 as transforms
from tqdm import tqdm

CLASSNAMES: Sequence[str] = open_clip.IMAGENET_CLASSNAMES
_info: Any = ImageNetInfo()
WNIDS: dict[str, int] = {wnid: label for label, wnid in enumerate(_info.label_names())}
# open_clip has functions; what they make of a brace is the prompt as everything here writes it.
TEMPLATES: dict[str, list[str]] = {
    "openai": [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES],
    "simple": [template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES],
}
UNREADABLE = -1


class Place(NamedTuple):
    """Where the bytes of an image lie: in a file of its own, or within a shard."""

    file: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Item(NamedTuple):
    """A uint8 image (3, size, size) and its label; for what can't be read, `UNREADABLE` and the reason."""

    image: Tensor
    label: int
    problem: str


@dataclass(frozen=True)
class ImageNet(torch.utils.data.Dataset[Item]):
    """N images of ImageNet's classes, decoded one by one when they are asked for.

    Args:
        places: of the images.
        labels: (N,) int64, from 0 to 999.
        size: of the decoded images.
        transform: image to uint8 (3, size, size).
        classnames: 1,000 names.
        templates: prompts with one `{}` for the class name.
    """

    places: Sequence[Place]
    labels: Tensor
    size: int
    transform: Callable[[Image.Image], Tensor]
    classnames: Sequence[str] = CLASSNAMES
    templates: Sequence[str] = tuple(TEMPLATES["openai"])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Item:
        place = self.places[index]
        try:
            image = Image.open(io.BytesIO(place.read())).convert("RGB")
        except Exception as error:  # whatever a decoder raises on bytes that are not what they should be
            problem = f"{place.file}, the image at byte {place.offset}: {error}"
            return Item(torch.zeros(3, self.size, self.size, dtype=torch.uint8), UNREADABLE, problem)
        return Item(self.transform(image), int(self.labels[index]), "")


def load_imagenet(
    source: str, image_size: int, *, preprocessing: PreprocessCfg, templates: Literal["openai", "simple"] = "openai"
) -> ImageNet:
    """Find the images; nothing is decoded yet.

    Args:
        source: uncompressed local shards with `KEY.jpg` and `KEY.cls`, by path or pattern; a folder of them (see
            imagenet_shards.py); or a folder with a subfolder of images per class, named by WordNet ID (`n01440764`) or
            by number (`0` to `999`, as ImageNetV2).
        image_size: instead of that of `preprocessing`.
        preprocessing: how the model wants its images resized.
        templates: open_clip's 80 (openai) or 7 of them (simple).

    Raises:
        FileNotFoundError: when a shard or folder is missing.
        ValueError: when there are no images, or labels that are not those of ImageNet.
    """
    problems: list[str] = []
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.tar")):
        found = list(_in_folder(folder))
    else:
        shards = expand(str(folder / "*.tar") if folder.is_dir() else source)
        if not all(is_local(shard) for shard in shards):
            raise ValueError(f"imagenet {source}: its shards must be local files, for they are read in parts")
        names = classnames_beside(shards[0])
        if names and len(names) != len(CLASSNAMES):
            raise ValueError(
                f"imagenet {source}: {len(names)} class names lie beside it and ImageNet has {len(CLASSNAMES)}, so "
                "these are other classes: take zero_shot for it"
            )
        bar = tqdm(shards, desc="looking for images", unit=" shards", delay=1, disable=None)
        found = [image for shard in bar for image in _in_shard(shard, problems.append)]
    if not found:
        raise ValueError(f"imagenet {source} holds no images" + (f": {problems[0]}" if problems else ""))
    for problem in problems:
        tqdm.write(f"skipped {problem}", file=sys.stderr)
    labels = torch.tensor([label for _, label in found])
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < len(CLASSNAMES):
            raise ValueError(f"imagenet {source} has a label {label}, and ImageNet's are 0 to {len(CLASSNAMES) - 1}")
    transform = _to_pixels(replace(preprocessing, size=image_size))
    return ImageNet([place for place, _ in found], labels, image_size, transform, CLASSNAMES, TEMPLATES[templates])


def _in_folder(folder: Path) -> Iterator[tuple[Place, int]]:
    files = torchvision.datasets.ImageFolder(str(folder))
    labels = [_label_of(name, folder) for name in files.classes]
    yield from ((Place(path), labels[number]) for path, number in files.samples)


def _label_of(name: str, folder: Path) -> int:
    if name in WNIDS:
        return WNIDS[name]
    if name.isdecimal():
        return int(name)
    raise ValueError(f"imagenet {folder}: {name} is no class of ImageNet, whose subfolders are n01440764 to n15075141")


def _in_shard(shard: str, report: Report) -> Iterator[tuple[Place, int]]:
    """Images with their labels, as far as the shard can be read."""
    try:
        with tarfile.open(shard, "r:") as archive:
            for key, members in itertools.groupby(archive, lambda member: _key_and_suffix(member)[0]):
                files = {_key_and_suffix(member)[1]: member for member in members}
                image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
                if image is None:
                    continue
                label = _content(archive, files["cls"]) if "cls" in files else b""
                if not label.strip().isdigit():
                    raise ValueError(f"{shard}: {key} has no label, a number in {key}.cls")
                yield Place(shard, image.offset_data, image.size), int(label)
    except (tarfile.TarError, EOFError, OSError) as error:
        report(f"{shard} or its end: {error}")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file: Any = archive.extractfile(member)
    content: bytes = file.read()
    return content


def _key_and_suffix(member: tarfile.TarInfo) -> tuple[str, str]:
    key, suffix = webdataset.tariterators.base_plus_ext(member.name) if member.isfile() else (None, None)
    return key or "", (suffix or "").lower()


def _to_pixels(preprocessing: PreprocessCfg) -> Callable[[Image.Image], Tensor]:
    """open_clip's own transform without its end, the floats, which are made on the model's device."""
    whole = open_clip.transform.image_transform_v2(preprocessing, is_train=False)
    steps: Callable[[Image.Image], Tensor] = transforms.Compose([*whole.transforms[:-2], transforms.PILToTensor()])
    return steps
