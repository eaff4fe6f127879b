"""An encoded image becomes a random crop of it: uint8, and PIL's pixels within the rounding, in half of PIL's time.

    file -> its header -> box -> decode, cut out, resize -> (3, H, W) -> batch -> device
                           `---> file and box -> batch -> decode, cut out, resize on the device

torchvision has libjpeg decode JPEG files, and resizes uint8 without floats in between. Other files are PIL's. Nobody
turns images round by their EXIF, and boxes are those of torchvision's RandomResizedCrop.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as pixels

Decode = Literal["full", "reduced", "device"]
Box = tuple[int, int, int, int]  # top, left, height, width
ASPECT = (3 / 4, 4 / 3)  # of a crop: the narrowest and the widest
END = b"\xff\xd9"  # of a JPEG file


class EncodedCrop(NamedTuple):
    """A JPEG file, and what is to be cut out of it."""

    file: bytes
    box: Box


class EncodedCrops(NamedTuple):
    """A batch that its device decodes, with `decode_on`.

    Args:
        files: all JPEG files in a row, uint8.
        lengths: B numbers of bytes in `files`; 0 for an image that is decoded already.
        boxes: of the images that are not.
        crops: (D, 3, H, W) uint8, the images that are decoded already.
        places: B names of the images.
        size: H and W.
    """

    files: Tensor
    lengths: list[int]
    boxes: list[Box]
    crops: Tensor
    places: list[str]
    size: list[int]


@dataclass(frozen=True)
class RandomCrop:
    """A random part of an image; draws from torch's generator what torchvision's RandomResizedCrop draws.

    Args:
        size: H and W of the crop, or both.
        scale: share of the image's area that the part takes, at least and at most.
        decode: full: every pixel, and then those of the part are resized. reduced: a JPEG whose part is at least twice
            as large as the crop is decoded at a half, quarter or eighth of its size; less work, but other pixels, and
            the edges of the part may move by half of what becomes one pixel. device: JPEGs stay what they are, for
            `decode_on`.
    """

    size: int | Sequence[int]
    scale: tuple[float, float] = (0.9, 1.0)
    decode: Decode = "full"

    def __call__(self, image: bytes | Tensor) -> Tensor | EncodedCrop:
        """A file, or uint8 (3, H', W'), to uint8 (3, H, W), or to what `decode_on` takes.

        Raises:
            ValueError: when the file can't be decoded.
        """
        if isinstance(image, Tensor):
            return cut_out(image, self.box(image), self.shape)
        try:
            opened = self.open(image)
        except Exception as error:  # whatever a decoder raises on bytes that are not what they should be
            raise ValueError(str(error)) from error
        return opened if isinstance(opened, EncodedCrop) else cut_out(*opened, self.shape)

    def open(self, file: bytes) -> EncodedCrop | tuple[Tensor, Box]:
        """What is decoded here of a file, uint8 (3, H', W'), and the part of it."""
        image = Image.open(io.BytesIO(file))  # reads no more than the header
        box = self.box(image)
        if self.decode == "device" and is_plain_jpeg(image) and file.rstrip(b"\0").endswith(END):
            return EncodedCrop(file, box)
        factor = self.factor(box) if self.decode == "reduced" and is_plain_jpeg(image) else 1
        if factor == 1:
            return decode(file, image), box
        image.draft(None, (image.width // factor, image.height // factor))
        return pixels.pil_to_tensor(image.convert("RGB")), smaller(box, factor)

    def box(self, image: Image.Image | Tensor) -> Box:
        """Drawn for an image of this size."""
        box: Box = RandomResizedCrop.get_params(image, self.scale, ASPECT)
        return box

    def factor(self, box: Box) -> int:
        """How many times smaller the image may be decoded, so that the part has as many pixels as the crop."""
        spare = min(box[2] / self.shape[0], box[3] / self.shape[1])
        return next((factor for factor in (8, 4, 2) if factor <= spare), 1)

    @property
    def shape(self) -> list[int]:
        """H and W."""
        return [self.size] * 2 if isinstance(self.size, int) else list(self.size)


def smaller(box: Box, factor: int) -> Box:
    """The same part of an image that is `factor` times smaller, its edges rounded."""
    top, left, height, width = box
    edges = (top, left, top + height, left + width)
    top, left, bottom, right = (round(edge / factor) for edge in edges)
    return top, left, bottom - top, right - left


def is_plain_jpeg(image: Image.Image) -> bool:
    """Whether every decoder makes the same of it; of CMYK they do not."""
    return image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")


def decode(file: bytes, image: Image.Image) -> Tensor:
    """The pixels of `file`, which `image` was opened from: uint8 (3, H, W)."""
    if is_plain_jpeg(image):
        try:
            return decode_files([torch.frombuffer(bytearray(file), dtype=torch.uint8)], "cpu")[0]
        except RuntimeError:  # PIL, which is next, may read it all the same, and else says better what is wrong
            pass
    whole: Tensor = pixels.pil_to_tensor(image.convert("RGB"))
    return whole


def decode_files(files: list[Tensor], device: Any) -> list[Tensor]:
    """JPEG files to uint8 (3, H, W) on `device`: libjpeg on a CPU, nvJPEG on a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchvision 0.29 points at torchcodec
        found: list[Tensor] = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
    return found


def cut_out(image: Tensor, box: Box, size: list[int]) -> Tensor:
    """A part of uint8 (3, H', W'), resized to (3, H, W). The colours of a pixel stay side by side, which is faster."""
    part = pixels.crop(image, *box).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    crop: Tensor = pixels.resize(part, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return crop


def stack(crops: list[Tensor], size: list[int]) -> Tensor:
    """Crops of H x W as (B, 3, H, W), with the colours of a pixel side by side as in `cut_out`."""
    rows = [crop.permute(1, 2, 0) for crop in crops]
    batch = torch.stack(rows) if rows else torch.empty(0, *size, 3, dtype=torch.uint8)
    return batch.permute(0, 3, 1, 2)


def collate(images: Sequence[Tensor | EncodedCrop], places: Sequence[str], size: list[int]) -> Tensor | EncodedCrops:
    """Crops of H x W to a batch: uint8 (B, 3, H, W), if all of them are decoded."""
    crops = [image for image in images if isinstance(image, Tensor)]
    if len(crops) == len(images):
        return stack(crops, size)
    encoded = [image for image in images if isinstance(image, EncodedCrop)]
    return EncodedCrops(
        files=torch.frombuffer(bytearray().join(image.file for image in encoded), dtype=torch.uint8),
        lengths=[len(image.file) if isinstance(image, EncodedCrop) else 0 for image in images],
        boxes=[image.box for image in encoded],
        crops=stack(crops, size),
        places=list(places),
        size=size,
    )


def decode_on(device: Any, images: Tensor | EncodedCrops, report: Callable[[str], object]) -> Tensor:
    """A batch as `collate` leaves it to contiguous uint8 (B, 3, H, W) on `device`.

    nvJPEG rounds otherwise than libjpeg: a GPU's pixels are not those of a CPU.

    Args:
        report: is called with a sentence for every image that can't be decoded; it is black then. (Its worker has seen
            only that the file begins and ends as it should.)
    """
    if isinstance(images, Tensor):
        return images.to(device, non_blocking=True).contiguous()
    places = [place for place, length in zip(images.places, images.lengths, strict=True) if length]
    files = images.files.split([length for length in images.lengths if length])
    decoded = _decode_together(list(files), places, device, report)
    black = torch.zeros(3, *images.size, dtype=torch.uint8, device=device)
    cut = (
        black if image is None else cut_out(image, box, images.size)
        for image, box in zip(decoded, images.boxes, strict=True)
    )
    crops = iter(images.crops.to(device, non_blocking=True))
    return torch.stack([next(cut) if length else next(crops) for length in images.lengths])


def _decode_together(
    files: list[Tensor], places: list[str], device: Any, report: Callable[[str], object]
) -> Sequence[Tensor | None]:
    try:
        return decode_files(files, device)
    except RuntimeError:  # of one of them, and the others are lost with it
        alone = (_decode_alone(file, place, report) for file, place in zip(files, places, strict=True))
        return [None if image is None else image.to(device) for image in alone]


def _decode_alone(file: Tensor, place: str, report: Callable[[str], object]) -> Tensor | None:
    whole = file.numpy().tobytes()
    try:
        return decode(whole, Image.open(io.BytesIO(whole)))
    except Exception as error:  # as in a worker
        report(f"{place}: {error}; black instead")
        return None
