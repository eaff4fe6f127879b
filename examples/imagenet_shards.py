"""ImageNet's validation images as WebDataset shards, for `train_clip.py --imagenet`.

    python examples/imagenet_shards.py --folder imagenet/val --output imagenet-val
    python examples/imagenet_shards.py --folder ILSVRC/Data/CLS-LOC/val --listing LOC_val_solution.csv --output ...

The usual folder has a subfolder per class (`n01440764/ILSVRC2012_val_00000293.JPEG`); Kaggle's has none, and a list of
the classes. Any other folder with a subfolder per class becomes shards for `--zero-shot` in the same way:

    python examples/imagenet_shards.py --folder birds/test --names names.txt --output shards/birds

Images are copied byte for byte, in a random order: any of the shards are a fair sample of all of them.
"""

import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torchvision
import tyro
import webdataset
from clip_data import TEMPLATES
from clip_imagenet import CLASSNAMES, WNIDS
from clip_shards import IMAGE_SUFFIXES
from tqdm import tqdm
from user_errors import UserError, one_line, setting_up

USUAL_FOLDER = (
    "the usual one has a subfolder per class, and torchvision.datasets.ImageNet(FOLDER, 'val') makes it as FOLDER/val "
    "out of ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz in FOLDER; for Kaggle's give --listing "
    "LOC_val_solution.csv"
)


@dataclass(frozen=True)
class Config:
    """What becomes shards, and where.

    Args:
        folder: with a subfolder of images per class; their sorted names are the classes 0, 1, ...
        output: a new folder for the shards (`KEY.jpg`, `KEY.cls`, `KEY.txt`), `classnames.txt` and `sizes.json`.
        names: a file with a class name per line. By default those of open_clip for ImageNet's WordNet IDs, and
            otherwise those of the subfolders.
        listing: of a folder without subfolders: a file with the name of an image and its WordNet ID on each line.
        per_shard: images.
        seed: of the order.
    """

    folder: Path
    output: Path
    names: Path | None = None
    listing: Path | None = None
    per_shard: int = 1000
    seed: int = 0


def main(config: Config) -> None:
    """Write everything, or nothing."""
    with setting_up():
        if config.output.exists():
            raise UserError(f"{config.output} is there already: take another --output")
        if config.per_shard < 1:
            raise UserError(f"per_shard must be positive, got {config.per_shard}")
        images = in_subfolders(config.folder) if config.listing is None else in_listing(config.folder, config.listing)
        classes = sorted({name for _, name in images})
        names = names_of(classes, config.names)
        random.Random(config.seed).shuffle(images)
        output = config.output.absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is whole; what an interrupted run leaves has another name, if it leaves anything.
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as place:
            part = Path(place) / "shards"
            part.mkdir()
            write(part, images, classes, names, config.per_shard)
            part.rename(output)
    option = "--imagenet" if classes == list(WNIDS) else "--zero-shot"
    print(f"{len(images)} images of {len(classes)} classes are in {config.output}: {option} '{config.output}/*.tar'")


def in_subfolders(folder: Path) -> list[tuple[Path, str]]:
    """Images with their classes, which the subfolders are named by."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    if not any(path.is_dir() for path in folder.iterdir()):
        raise UserError(f"{folder} has no subfolders: {USUAL_FOLDER}")
    files = torchvision.datasets.ImageFolder(str(folder), is_valid_file=is_image)
    return [(Path(path), files.classes[label]) for path, label in files.samples]


def in_listing(folder: Path, listing: Path) -> list[tuple[Path, str]]:
    """Images with their classes, by a line `NAME WNID` or `NAME,WNID ...` for each."""
    lines = listing.read_text(encoding="utf-8").splitlines()
    found = [re.match(r"\s*([^\s,]+)[\s,]+(n\d{8})\b", line) for line in lines]
    classes = {Path(match[1]).stem: match[2] for match in found if match}
    images = sorted(path for path in folder.iterdir() if is_image(path))
    missing = [path.name for path in images if path.stem not in classes]
    if missing or not images:
        what = f"does not name {missing[0]}" if missing else f"is of no use: {folder} holds no images"
        raise UserError(f"the listing {listing} {what}")
    return [(path, classes[path.stem]) for path in images]


def is_image(path: str | Path) -> bool:
    return Path(path).suffix[1:].lower() in IMAGE_SUFFIXES


def names_of(classes: Sequence[str], file: Path | None) -> list[str]:
    """The name of each class."""
    if file is not None:
        names = file.read_text(encoding="utf-8").splitlines()
        if len(names) != len(classes):
            raise UserError(f"{file} has {len(names)} lines for {len(classes)} classes")
        return names
    if all(name in WNIDS for name in classes):
        return [CLASSNAMES[WNIDS[name]] for name in classes]
    return [name.replace("_", " ") for name in classes]


def write(
    folder: Path, images: Sequence[tuple[Path, str]], classes: Sequence[str], names: Sequence[str], per_shard: int
) -> None:
    """Shards in the order of `images`, and what describes them."""
    sizes: Counter[str] = Counter()
    pattern = str(folder).replace("%", "%%") + "/%05d.tar"
    # The time of a file would make the same shards differ from run to run.
    with webdataset.ShardWriter(pattern, maxcount=per_shard, mtime=0, verbose=0) as writer:
        for number, (path, name) in enumerate(tqdm(images, desc="writing shards", unit=" images", disable=None)):
            label = classes.index(name)
            suffix = path.suffix[1:].lower().replace("jpeg", "jpg")
            writer.write(
                {
                    "__key__": f"{number:08d}", suffix: path.read_bytes(), "cls": label,
                    "txt": TEMPLATES[0].format(names[label]),
                }
            )  # fmt: skip
            sizes[Path(writer.fname).name] += 1
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    (folder / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with one_line("imagenet_shards.py"):
        main(tyro.cli(Config))
