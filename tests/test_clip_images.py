"""Random crops of encoded images are what open_clip makes of them with PIL, within the rounding. Nothing is timed."""

import io

import clip_images
import numpy as np
import open_clip
import pytest
import torch
from clip_evaluation import to_floats
from clip_images import EncodedCrop, EncodedCrops, RandomCrop
from PIL import Image

SCALE = (0.2, 1.0)


def scene(width: int = 125, height: int = 94) -> Image.Image:
    """Smooth shades with edges and some noise, as in a photo."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / max(width, height)
    shades = np.stack([np.sin(9 * x + 4 * y), np.cos(7 * y - 3 * x), np.sin(11 * x * y)], axis=-1) * 70 + 128
    shades[(x - 0.4) ** 2 + (y - 0.4) ** 2 < 0.06] += 50
    return Image.fromarray((shades + generator.normal(0, 3, shades.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(scene(), exif=exif)


FILES = {
    "jpeg": encoded(scene(), quality=90),
    "jpeg of odd size": encoded(scene(77, 111)),
    "jpeg, colours whole": encoded(scene(), subsampling=0),
    "progressive jpeg": encoded(scene(), progressive=True),
    "jpeg in rgb": encoded(scene(), keep_rgb=True),
    "grey jpeg": encoded(scene().convert("L")),
    "cmyk jpeg": encoded(scene().convert("CMYK")),
    "turned by its exif": with_exif(6),
    "png": encoded(scene(), "PNG"),
    "palette png": encoded(scene().convert("P"), "PNG"),
    "png with alpha": encoded(scene().convert("RGBA"), "PNG"),
    "webp": encoded(scene(), "WEBP"),
}


def by_open_clip(file: bytes, size: int, seed: int, scale=SCALE) -> torch.Tensor:
    """As before: PIL decodes and resizes; here with the floats made uint8 again."""
    preprocessing = open_clip.transform.PreprocessCfg(size=size)
    transform = open_clip.transform.image_transform_v2(preprocessing, is_train=True, aug_cfg={"scale": scale})
    torch.manual_seed(seed)
    pixels = transform(Image.open(io.BytesIO(file)).convert("RGB"))
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return ((pixels * std + mean) * 255).round()


def cropped(file, size: int, seed: int, decode: clip_images.Decode = "full", scale=SCALE):
    torch.manual_seed(seed)
    return RandomCrop(size, scale, decode)(file)


@pytest.mark.parametrize("name", FILES)
def test_the_pixels_are_those_of_open_clip(name):
    """Two levels of 255 apart at most, made smaller and larger; the generator ends in the same place."""
    for seed, size in enumerate([32, 32, 64, 224]):
        expected = by_open_clip(FILES[name], size, seed)
        drawn = torch.rand(1)
        found = cropped(FILES[name], size, seed)
        assert torch.equal(torch.rand(1), drawn)
        assert found.dtype == torch.uint8
        assert found.shape == (3, size, size)
        difference = (found - expected).abs()
        assert difference.max() <= 2
        assert difference.mean() < 0.1


def test_normalised_they_are_the_floats_of_open_clip():
    preprocessing = open_clip.transform.PreprocessCfg(size=32)
    transform = open_clip.transform.image_transform_v2(preprocessing, is_train=True, aug_cfg={"scale": SCALE})
    torch.manual_seed(0)
    expected = transform(Image.open(io.BytesIO(FILES["jpeg"])).convert("RGB"))
    found = to_floats(cropped(FILES["jpeg"], 32, 0)[None], "cpu", preprocessing.mean, preprocessing.std)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2.1 / 255 / min(preprocessing.std))


def test_libjpeg_gives_pil_s_pixels_exactly():
    for name in ("jpeg", "jpeg of odd size", "jpeg, colours whole", "progressive jpeg", "jpeg in rgb", "grey jpeg"):
        image = Image.open(io.BytesIO(FILES[name]))
        found = clip_images.decode(FILES[name], image)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB"))), name


def test_images_in_memory_are_cropped_likewise():
    whole = clip_images.decode(FILES["jpeg"], Image.open(io.BytesIO(FILES["jpeg"])))
    assert torch.equal(cropped(whole, 32, 3), cropped(FILES["jpeg"], 32, 3))


def test_an_oblong_crop():
    assert RandomCrop((16, 32))(FILES["jpeg"]).shape == (3, 16, 32)


class TestReduced:
    def test_the_part_keeps_as_many_pixels_as_the_crop(self):
        crop = RandomCrop(32, decode="reduced")
        boxes = {(63, 200): 1, (64, 64): 2, (200, 127): 2, (128, 200): 4, (300, 256): 8, (2000, 2000): 8}
        assert {shape: crop.factor((0, 0, *shape)) for shape in boxes} == boxes

    @pytest.mark.parametrize("name", ["jpeg", "grey jpeg", "jpeg of odd size"])
    def test_fewer_pixels_are_decoded_and_what_comes_out_is_nearly_the_same(self, name, monkeypatch):
        """As from the whole image, where the edges of the part lie between the pixels of the small one."""
        cut_out, seen = clip_images.cut_out, []
        monkeypatch.setattr(clip_images, "cut_out", lambda *args: seen.append(args) or cut_out(*args))
        for seed in range(5):
            full, reduced = (cropped(FILES[name], 16, seed, how, (0.5, 1.0)) for how in ("full", "reduced"))
            (whole, box, size), (small, small_box, _) = seen[-2:]
            factor = RandomCrop(16).factor(box)
            assert small.shape[1:] == tuple(-(-edge // factor) for edge in whole.shape[1:])
            assert max(abs(factor * now - before) for now, before in zip(small_box, box, strict=True)) <= factor
            rest = [-edge % factor for edge in whole.shape[:0:-1]]  # where the small one's last pixels go beyond
            padded = torch.nn.functional.pad(whole.float(), (0, rest[0], 0, rest[1]), "replicate").byte()
            same_edges = cut_out(padded, [factor * edge for edge in small_box], size).int()
            assert (reduced - same_edges).abs().float().mean() < 2
            assert (reduced - full.int()).abs().float().mean() < 8

    @pytest.mark.parametrize("name", ["png", "cmyk jpeg"])
    def test_other_files_are_decoded_in_full(self, name):
        assert torch.equal(cropped(FILES[name], 16, 0, "reduced"), cropped(FILES[name], 16, 0))

    def test_so_is_a_small_part(self):
        assert torch.equal(cropped(FILES["jpeg"], 64, 0, "reduced"), cropped(FILES["jpeg"], 64, 0))


class TestDevice:
    def batch(self, decode: clip_images.Decode):
        images = [cropped(file, 32, seed, decode) for seed, file in enumerate(FILES.values())]
        return clip_images.collate(images, list(FILES), [32, 32])

    def test_a_batch_decoded_on_the_device_is_that_of_the_workers(self):
        later, now = self.batch("device"), self.batch("full")
        assert isinstance(later, EncodedCrops)
        assert [name for name, length in zip(FILES, later.lengths, strict=True) if length == 0] == [
            "cmyk jpeg", "png", "palette png", "png with alpha", "webp",
        ]  # fmt: skip
        assert torch.equal(clip_images.decode_on("cpu", later, pytest.fail), now)
        assert torch.equal(clip_images.decode_on("cpu", now, pytest.fail), now)
        assert clip_images.decode_on("cpu", now, pytest.fail).is_contiguous()

    def test_it_travels_as_two_tensors_through_a_worker(self):
        loader = torch.utils.data.DataLoader(Batches(self.batch("device")), batch_size=None, num_workers=1)
        found = clip_images.decode_on("cpu", next(iter(loader)), pytest.fail)
        assert torch.equal(found, self.batch("full"))
        assert sum(isinstance(part, torch.Tensor) for part in self.batch("device")) == 2

    def test_a_decoder_that_refuses_one_image_loses_no_other(self):
        """And what nobody can decode is reported, and black."""
        file = FILES["jpeg"]
        broken = file[: file.index(b"\xff\xda")] + clip_images.END  # no pixels: a worker's glance does not see it
        images = [EncodedCrop(one, (0, 0, 94, 125)) for one in (file, broken, FILES["grey jpeg"])]
        said = []
        found = clip_images.decode_on("cpu", clip_images.collate(images, ["a", "b", "c"], [32, 32]), said.append)
        assert [line.partition(":")[0] for line in said] == ["b"]
        assert said[0].endswith("; black instead")
        assert not found[1].any()
        for row in (0, 2):
            alone = clip_images.collate([images[row]], ["x"], [32, 32])
            assert torch.equal(found[row], clip_images.decode_on("cpu", alone, pytest.fail)[0])

    @pytest.mark.parametrize("decode", ["full", "reduced", "device"])
    def test_a_file_that_breaks_off_is_an_error_of_the_worker(self, decode):
        for length in (10, 300, len(FILES["jpeg"]) - 3):
            with pytest.raises(ValueError, match=r"[Tt]runcated|identify"):
                cropped(FILES["jpeg"][:length], 16, 0, decode)


class Batches(torch.utils.data.IterableDataset):
    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        yield self.batch
