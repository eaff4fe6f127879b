"""Image-text data for the examples, in memory: generated scenes, WebDataset shards, image folders, torchvision sets.

Everything becomes one `CaptionedImages`: uint8 images of one size, a caption each, and, for the zero-shot evaluation,
labels with the class names and prompt templates that belong to them.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import captioned_scenes
import torch
import torchvision
from clip_shards import RawSample, Sample, expand, parse, raw_samples
from torch import Tensor
from torchvision.transforms import v2 as transforms
from tqdm import tqdm

TEMPLATES = ["a photo of a {}."]


@dataclass(frozen=True)
class CaptionedImages(torch.utils.data.Dataset[Any]):
    """N images with captions, and class labels where there are any.

    Args:
        images: (N, 3, size, size) uint8.
        captions: N strings.
        labels: (N,) int64 into `classnames`, or None.
        classnames: names of the classes, for the zero-shot classifier.
        templates: prompts with one `{}` for the class name.
        all_captions: every caption of each image, where an image has several; `captions` are the first ones.
    """

    images: Tensor
    captions: list[str]
    labels: Tensor | None = None
    classnames: Sequence[str] = ()
    templates: Sequence[str] = tuple(TEMPLATES)
    all_captions: Sequence[Sequence[str]] = ()

    def __len__(self) -> int:
        return len(self.images)

    def head(self, count: int) -> "CaptionedImages":
        """The first `count` of them."""
        return self._part(slice(count))

    def tail(self, count: int) -> "CaptionedImages":
        """The last `count` of them."""
        return self._part(slice(max(0, len(self) - count), None))

    def _part(self, rows: slice) -> "CaptionedImages":
        return replace(
            self,
            images=self.images[rows],
            captions=self.captions[rows],
            labels=None if self.labels is None else self.labels[rows],
            all_captions=self.all_captions[rows],
        )

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return self.images[index], self.captions[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, list[str]]:
        """A whole batch at once, which DataLoader prefers."""
        return self.images[indices], [self.captions[index] for index in indices]


def load(source: str, *, image_size: int, train: bool, limit: int | None = None) -> CaptionedImages:
    """Data by name or place.

    Args:
        source: a folder with one subfolder of images per class, `"torchvision:CIFAR10"` (or another of its sets), or
            WebDataset shards by path, URL or brace pattern.
        image_size: side of the square images; others are resized by their shorter side and cropped at the centre.
        train: which split of a torchvision set.
        limit: load at most so many images.
    """
    kind, _, name = source.partition(":")
    if kind == "torchvision":
        return load_torchvision(name, image_size=image_size, train=train, limit=limit)
    if Path(source).is_dir():
        return load_image_folder(source, image_size=image_size, limit=limit)
    return load_shards(source, image_size=image_size, limit=limit)


def load_scenes(num_scenes: int, *, image_size: int = 32, seed: int = 0, **options: Any) -> CaptionedImages:
    """Generated scenes; `options` are those of `captioned_scenes.make_scenes`."""
    scenes = captioned_scenes.make_scenes(num_scenes, image_size=image_size, seed=seed, **options)
    return CaptionedImages(*scenes, captioned_scenes.CLASSNAMES, captioned_scenes.TEMPLATES)


def load_shards(
    shards: str | Sequence[str],
    *,
    image_size: int,
    classnames: Sequence[str] = (),
    templates: Sequence[str] = tuple(TEMPLATES),
    limit: int | None = None,
) -> CaptionedImages:
    """WebDataset shards as described in clip_shards.py, by path, URL or pattern; broken samples are left out.

    Args:
        shards: for example `"cc3m-{00000..00009}.tar"` or `"https://.../{000..012}.tar"`.
        classnames: of the labels in `KEY.cls`; by default those of a `meta.json` (`"classes"`) or `classnames.txt`
            beside local shards.
        limit: load at most so many.

    Raises:
        FileNotFoundError: when a local shard is missing.
        ValueError: when the shards hold no complete sample.
    """
    places = expand(shards)
    problems: list[str] = []
    samples = _complete(raw_samples(places, problems.append), problems)
    classnames = classnames or classnames_beside(places[0])
    data = _in_memory(samples, places[0], image_size, classnames, templates, limit)
    if problems:
        print(f"skipped {len(problems)} broken samples or shards, the first one: {problems[0]}", file=sys.stderr)
    return data


def _complete(raws: Iterable[RawSample], problems: list[str]) -> Iterator[Sample]:
    for raw in raws:
        try:
            yield parse(raw)
        except ValueError as error:
            problems.append(str(error))


def load_image_folder(
    folder: str | Path,
    *,
    image_size: int,
    templates: Sequence[str] = tuple(TEMPLATES),
    limit: int | None = None,
) -> CaptionedImages:
    """A folder with one subfolder of images per class; the first template makes the captions."""
    return _labelled(torchvision.datasets.ImageFolder(str(folder)), str(folder), image_size, templates, limit)


def load_torchvision(
    name: str,
    *,
    image_size: int,
    train: bool,
    root: str | Path = "build/torchvision",
    templates: Sequence[str] = tuple(TEMPLATES),
    limit: int | None = None,
) -> CaptionedImages:
    """A torchvision classification set by name, such as `"CIFAR10"`; downloads it once."""
    if not hasattr(torchvision.datasets, name):
        raise ValueError(f"torchvision has no data set {name!r}: its names are those of torchvision.datasets")
    dataset = getattr(torchvision.datasets, name)(str(root), train=train, download=True)
    return _labelled(dataset, name, image_size, templates, limit)


def _labelled(
    dataset: Any, source: str, image_size: int, templates: Sequence[str], limit: int | None
) -> CaptionedImages:
    classnames = [name.replace("_", " ") for name in dataset.classes]
    samples = (
        Sample(image.convert("RGB"), [templates[0].format(classnames[label])], label)
        for image, label in (dataset[index] for index in range(len(dataset)))
    )
    return _in_memory(samples, source, image_size, classnames, templates, limit)


def _in_memory(
    samples: Iterable[Sample],
    source: str,
    image_size: int,
    classnames: Sequence[str],
    templates: Sequence[str],
    limit: int | None,
) -> CaptionedImages:
    resize = transforms.Compose(
        [transforms.Resize(image_size), transforms.CenterCrop(image_size), transforms.PILToTensor()]
    )
    images, captions, labels = [], [], []
    for sample in tqdm(_at_most(samples, limit), desc=f"reading {Path(source).name}", unit=" images"):
        images.append(resize(sample.image))
        captions.append(sample.captions)
        labels.append(sample.label)
    if not images:
        raise ValueError(f"{source} holds no image with a caption")
    known = None if None in labels else torch.tensor(labels)
    several = captions if any(len(texts) > 1 for texts in captions) else ()
    return CaptionedImages(torch.stack(images), [texts[0] for texts in captions], known, classnames, templates, several)


def _at_most(samples: Iterable[Any], limit: int | None) -> Iterator[Any]:
    for count, sample in enumerate(samples):
        if count == limit:
            return
        yield sample


def classnames_beside(shard: str) -> list[str]:
    """What `meta.json` (`"classes"`) or `classnames.txt` in the folder of a local shard say, or nothing."""
    folder = Path(shard).parent
    if (folder / "meta.json").is_file():
        return list(json.loads((folder / "meta.json").read_text(encoding="utf-8")).get("classes", []))
    if (folder / "classnames.txt").is_file():
        return (folder / "classnames.txt").read_text(encoding="utf-8").splitlines()
    return []
