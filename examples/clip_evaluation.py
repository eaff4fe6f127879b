"""What a CLIP model has learnt: zero-shot classification, image-text retrieval, and a linear probe of its features.

Sets are small and lie in memory, except for ImageNet's, whose images are read each time (see clip_imagenet.py).

Under torch.distributed every process encodes its share of the images and captions, and all of them get all features.
The generators of the training are left as they were, so that an evaluation changes nothing that comes after it.
"""

import contextlib
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import open_clip
import torch
import torch.distributed as dist
from clip_data import CaptionedImages, load
from clip_imagenet import UNREADABLE, ImageNet, load_imagenet
from clip_step import autocast
from open_clip.transform import PreprocessCfg
from torch import Tensor
from tqdm import tqdm
from user_errors import UserError

import gaussmask

HALF = (0.5, 0.5, 0.5)
RECALLS = (1, 5, 10)


def to_floats(images: Tensor, device: str, mean: Sequence[float] = HALF, std: Sequence[float] = HALF) -> Tensor:
    """uint8 (B, 3, H, W) to normalised floats."""
    offset, scale = (torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (mean, std))
    return images.to(device, non_blocking=True).float().sub_(offset).div_(scale)


@dataclass(frozen=True)
class Encoder:
    """A model, and what it takes to turn images and captions into its features.

    Args:
        model: with open_clip's `encode_image` and `encode_text`.
        tokenize: a list of strings to (B, L) int64.
        precision: see `clip_step.autocast`.
        mean, std: of the pixels, as shares of 255.
        batch_size: of one forward.
        seed: of the masks of a masked evaluation.
        workers: of each process, which read ImageNet's images.
    """

    model: Any
    tokenize: Callable[[list[str]], Tensor]
    device: str
    precision: str = "auto"
    mean: Sequence[float] = HALF
    std: Sequence[float] = HALF
    batch_size: int = 500
    seed: int = 0
    workers: int = 0
    _tokens: dict[tuple[str, ...], Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)

    def images(self, images: Tensor, *, normalize: bool = True) -> Tensor:
        """Features (N, D) float32 of uint8 images (N, 3, H, W)."""
        return self._encode(len(images), lambda rows: self.batch(images[rows], normalize=normalize))

    def batch(self, images: Tensor, *, normalize: bool = True) -> Tensor:
        """Features (B, D) float32 of a batch of uint8 images (B, 3, H, W), by this process alone."""
        with torch.no_grad(), autocast(self.precision, self.device):
            pixels = to_floats(images, self.device, self.mean, self.std)
            features: Tensor = self.model.encode_image(pixels, normalize=normalize)
            return features.float()

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Normalised features (N, D) float32 of N captions."""

        def encode(rows: Tensor) -> Tensor:
            tokens = self.tokenize([texts[row] for row in rows.tolist()]).to(self.device)
            return self.model.encode_text(tokens, normalize=True)

        return self._encode(len(texts), encode)

    def classifier(self, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
        """open_clip's zero-shot classifier (D, C)."""

        def tokenize(prompts: list[str]) -> Tensor:
            """Once: the 80,000 prompts of ImageNet take open_clip's tokenizer as long as the rest of an evaluation."""
            key = tuple(prompts)
            if key not in self._tokens:
                self._tokens[key] = self.tokenize(prompts)
            return self._tokens[key]

        with torch.no_grad(), autocast(self.precision, self.device):
            weights = open_clip.build_zero_shot_classifier(
                self.model,
                tokenize,
                classnames,
                [template.format for template in templates],
                num_classes_per_batch=10 if len(classnames) > 10 else None,
                device=self.device,
            )
        return weights.float()

    def _encode(self, count: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """All `count` features, each process having encoded an equal share of them, the last one perhaps twice."""
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        share = math.ceil(count / world_size)
        rows = (torch.arange(share) + rank * share).clamp(max=count - 1)
        with torch.no_grad(), autocast(self.precision, self.device):
            mine = torch.cat([encode(some).float() for some in rows.split(self.batch_size)])
        if world_size == 1:
            return mine
        everyone = [torch.empty_like(mine) for _ in range(world_size)]
        dist.all_gather(everyone, mine)
        return torch.cat(everyone)[:count]


@contextlib.contextmanager
def evaluating(encoder: Encoder, *, masked: bool = False) -> Iterator[None]:
    """The model in eval mode, with its drop on if `masked`; afterwards mode and generators are what they were."""
    training = encoder.model.training
    drop = gaussmask.attached(encoder.model)
    device = torch.device(encoder.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(encoder.seed)
        encoder.model.eval()
        if masked and drop is not None:
            drop.train()
        try:
            yield
        finally:
            encoder.model.train(training)


class EvaluationData(TypedDict, total=False):
    """What a model is evaluated on, by purpose."""

    zero_shot: CaptionedImages
    probe: CaptionedImages
    retrieval: CaptionedImages
    imagenet: ImageNet


def load_evaluation(
    image_size: int,
    *,
    zero_shot: str | None,
    probe: str | None,
    retrieval: str | None,
    imagenet: str | None = None,
    imagenet_templates: Literal["openai", "simple"] = "openai",
    preprocessing: PreprocessCfg | None = None,
) -> EvaluationData:
    """The images that a model is evaluated on.

    Args:
        zero_shot, probe, retrieval: places that `clip_data.load` takes.
        imagenet, imagenet_templates: see `clip_imagenet.load_imagenet`.
        preprocessing: how ImageNet's images are resized; open_clip's default if not given.

    Raises:
        ValueError: when a set lacks the labels, or the class names, that its purpose needs.
    """
    data: EvaluationData = {}
    if zero_shot:
        data["zero_shot"] = _labelled("zero_shot", zero_shot, image_size)
        if not data["zero_shot"].classnames:
            raise ValueError(f"zero_shot {zero_shot} has no class names: put a meta.json or classnames.txt beside it")
    if probe:
        data["probe"] = _labelled("probe", probe, image_size)
    if retrieval:
        data["retrieval"] = load(retrieval, image_size=image_size, train=False)
    if imagenet:
        data["imagenet"] = load_imagenet(
            imagenet, image_size, preprocessing=preprocessing or PreprocessCfg(), templates=imagenet_templates
        )
    return data


def _labelled(purpose: str, source: str, image_size: int) -> CaptionedImages:
    data = load(source, image_size=image_size, train=purpose == "probe")
    if data.labels is None:
        raise ValueError(f"{purpose} {source} has no labels (KEY.cls)")
    return data


def evaluate(encoder: Encoder, data: EvaluationData, *, masked: bool) -> dict[str, float]:
    """Every figure that the data allows, in percent."""
    found: dict[str, float] = {}
    if "zero_shot" in data:
        found |= {f"zero_shot_{name}": value for name, value in zero_shot(encoder, data["zero_shot"]).items()}
        if masked:
            accuracies = zero_shot(encoder, data["zero_shot"], masked=True)
            found |= {f"zero_shot_masked_{name}": value for name, value in accuracies.items()}
    if "imagenet" in data:
        accuracies = imagenet_zero_shot(encoder, data["imagenet"], masked=masked)
        found |= {f"imagenet_{name}": value for name, value in accuracies.items()}
    if "probe" in data:
        found["linear_probe"] = linear_probe(encoder, data["probe"], data["zero_shot"])
    if "retrieval" in data:
        found |= retrieval(encoder, data["retrieval"])
    return found


def zero_shot(encoder: Encoder, data: CaptionedImages, *, masked: bool = False) -> dict[str, float]:
    """Share of the images, in percent, whose class is the first guess (`top1`), or among the first five (`top5`).

    `mean_per_class_recall` is the share of first guesses too, of every class by itself, and then the mean over the
    classes: where some have many more images than others, `top1` is mostly about those, and who names the largest for
    every image is right as often as it comes.

    Args:
        masked: drop patches as in training (the papers' "inference" column); otherwise the model sees whole images.
    """
    if data.labels is None or not data.classnames:
        raise ValueError("zero-shot evaluation needs labels and classnames (KEY.cls, and meta.json or classnames.txt)")
    with evaluating(encoder, masked=masked):
        classifier = encoder.classifier(data.classnames, data.templates)
        guesses = (encoder.images(data.images) @ classifier).topk(min(5, classifier.shape[1]), dim=1).indices.cpu()
    hits = guesses == data.labels[:, None]
    images = data.labels.bincount()
    of_class = data.labels.bincount(hits[:, 0].double())[images > 0] / images[images > 0]
    return {
        "top1": _percent(hits[:, 0]),
        "top5": _percent(hits.any(dim=1)),
        "mean_per_class_recall": _percent(of_class),
    }


def imagenet_zero_shot(encoder: Encoder, data: ImageNet, *, masked: bool = False) -> dict[str, float]:
    """`top1` and `top5` as of `zero_shot`, over the images that can be read.

    The processes take the batches in turn, and each batch has a seed for its masks: neither the number of processes nor
    that of their workers changes a figure.

    Args:
        masked: also `masked_top1` and `masked_top5`, with patches dropped as in training.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = [rows.tolist() for rows in torch.arange(len(data)).split(encoder.batch_size)]
    # Everyone has as many turns, as FSDP wants; whoever has no batch left takes the last one, and doesn't count it.
    turns = range(rank, math.ceil(len(batches) / world_size) * world_size, world_size)
    loader = torch.utils.data.DataLoader(
        data,
        batch_sampler=[batches[min(turn, len(batches) - 1)] for turn in turns],
        num_workers=encoder.workers,
        pin_memory=encoder.device.startswith("cuda"),
        generator=torch.Generator(),
    )
    with evaluating(encoder):
        classifier = encoder.classifier(data.classnames, data.templates)
    prefixes = {"": False, "masked_": True} if masked else {"": False}
    counts = dict.fromkeys(["readable", *(f"{prefix}top{k}" for prefix in prefixes for k in (1, 5))], 0)
    for turn, (images, labels, problems) in zip(turns, loader, strict=True):
        readable = labels != UNREADABLE if turn < len(batches) else torch.zeros_like(labels, dtype=torch.bool)
        counts["readable"] += int(readable.sum())
        for prefix, drop in prefixes.items():
            with evaluating(encoder, masked=drop):
                torch.manual_seed(encoder.seed + turn)
                guesses = (encoder.batch(images) @ classifier).topk(5, dim=1).indices.cpu()
            hits = (guesses == labels[:, None])[readable]
            counts[f"{prefix}top1"] += int(hits[:, 0].sum())
            counts[f"{prefix}top5"] += int(hits.any(dim=1).sum())
        for problem in filter(None, problems if turn < len(batches) else []):
            tqdm.write(f"skipped {problem}", file=sys.stderr)
    total = torch.tensor(list(counts.values()), dtype=torch.float64, device=encoder.device)
    if world_size > 1:
        dist.all_reduce(total)
    if total[0] == 0:
        raise UserError("none of the images of imagenet can be read")
    return dict(zip(list(counts)[1:], (100 * total[1:] / total[0]).tolist(), strict=True))


def retrieval(encoder: Encoder, data: CaptionedImages, *, masked: bool = False) -> dict[str, float]:
    """Recall at 1, 5 and 10, in percent: of images by a caption, and of any of its own captions by an image.

    Args:
        masked: as for `zero_shot`.
    """
    captions = data.all_captions or [[caption] for caption in data.captions]
    owners = torch.tensor([image for image, texts in enumerate(captions) for _ in texts])
    with evaluating(encoder, masked=masked):
        images = encoder.images(data.images)
        texts = encoder.texts([text for some in captions for text in some])
    hits = {
        "image_to_text": owners[_best(images, texts)] == torch.arange(len(images))[:, None],
        "text_to_image": _best(texts, images) == owners[:, None],
    }
    return {f"{way}_r{k}": _percent(found[:, :k].any(dim=1)) for way, found in hits.items() for k in RECALLS}


@dataclass(frozen=True)
class Score:
    """One figure in percent that tells how good a model is on some data.

    Args:
        of: a model's: `of(encoder, data, masked=...)`.
        blind: what can be had without looking at the images: `blind(data)`.
    """

    name: str
    of: Callable[..., float]
    blind: Callable[[CaptionedImages], float]


def share_of_the_largest_class(data: CaptionedImages) -> float:
    """The top-1 of who names that class for every image, in percent."""
    if data.labels is None:
        raise ValueError("data has no labels")
    return 100 * data.labels.bincount().max().item() / len(data)


def recall_by_chance(data: CaptionedImages) -> float:
    """The mean of retrieval's six recalls, in percent, that a ranking at random has on average."""
    from scipy.stats import hypergeom  # a second, which a training should not wait for

    counts = [len(captions) for captions in data.all_captions] or [1] * len(data.captions)
    found = []
    for k in RECALLS:  # at least one of an image's own captions among k of all; an image among k
        found.append(hypergeom.sf(0, sum(counts), counts, min(k, sum(counts))).mean())
        found.append(min(k, len(counts)) / len(counts))
    return 100 * statistics.fmean(found)


TOP1 = Score(
    "top-1",
    lambda encoder, data, masked=False: zero_shot(encoder, data, masked=masked)["top1"],
    share_of_the_largest_class,
)
MEAN_RECALL = Score(
    "mean recall", lambda *args, **more: statistics.fmean(retrieval(*args, **more).values()), recall_by_chance
)


def score_for(data: CaptionedImages) -> Score:
    """Zero-shot top-1 where the data has classes, and otherwise the mean of retrieval's six recalls."""
    return TOP1 if data.labels is not None and data.classnames else MEAN_RECALL


def _best(queries: Tensor, items: Tensor) -> Tensor:
    """Indices (Q, 10) of the items most similar to each query, best first."""
    count = min(max(RECALLS), len(items))
    return torch.cat([(some @ items.T).topk(count, dim=1).indices for some in queries.split(1000)]).cpu()


def linear_probe(encoder: Encoder, train: CaptionedImages, test: CaptionedImages) -> float:
    """Accuracy in percent, on `test`, of a logistic regression on the features of `train`.

    scikit-learn's L-BFGS on standardised, unnormalised image features, with its default regularisation (C = 1).
    """
    from sklearn.linear_model import LogisticRegression  # a second, which only runs with a probe should wait for
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if train.labels is None or test.labels is None:
        raise ValueError("a linear probe needs labels (KEY.cls)")
    with evaluating(encoder):
        features, test_features = (encoder.images(data.images, normalize=False).cpu() for data in (train, test))
    probe: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(features.numpy(), train.labels.numpy())
    return 100 * float(probe.score(test_features.numpy(), test.labels.numpy()))


def _percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()
