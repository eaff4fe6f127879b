"""Small CLIP trainings: shards of noise, a model that a CPU trains in a second, and the program as a user starts it."""

import io
import json
from pathlib import Path

import clip_options
import numpy as np
import torch
import webdataset
from PIL import Image
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}
COLOURS = ["red", "green", "blue", "white"]


def picture(number: int, size: int = 40) -> bytes:
    """A JPEG of noise around a colour."""
    noise = np.random.default_rng(number).integers(0, 80, (size, size, 3))
    base = np.array([[160, 0, 0], [0, 160, 0], [0, 0, 160], [160, 160, 160]][number % 4])
    buffer = io.BytesIO()
    Image.fromarray((base + noise).astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_shards(folder: Path, count: int, per_shard: int, pattern: str = "shard-%03d.tar") -> list[Path]:
    """Image-text pairs with classes, and two captions each, in webdataset's own format."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / pattern), maxcount=per_shard, verbose=0) as writer:
        for number in range(count):
            colour = COLOURS[number % 4]
            captions = [f"a {colour} picture {number}", f"number {number}"]
            writer.write(
                {
                    "__key__": f"{number:06d}", "jpg": picture(number), "txt": captions[0], "cls": number % 4,
                    "json": {"captions": captions},
                }
            )  # fmt: skip
    (folder / "meta.json").write_text(json.dumps({"classes": COLOURS}))
    return sorted(folder.glob("*.tar"))


def options(**changes) -> clip_options.Config:
    """As from the command line."""
    return clip_options.parse(clip_options.as_arguments(changes), program="train_clip.py", description="")


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(first: Path, second: Path, phase: str = "training") -> None:
    """Bit for bit."""
    weights = [load_file(folder / phase / "model" / "open_clip_model.safetensors") for folder in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
