"""A small CLIP on a set in memory, with a mask or without: towers, loop, one run, its curve. The notebook runs this.

    images   -> patches -> tokens -> drop -> kept tokens -> image features --.
                                                                              > contrastive loss
    captions -> text tokens ------------------------------> text features  --'

`run` trains with one method, tunes unmasked for a short while, and evaluates in the three columns of the papers:
zero-shot with masked images, with whole images, and after tuning. clip_comparison.py compares runs.
"""

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import matplotlib.pyplot as plt
import open_clip
import pandas as pd
import timm
import torch
from clip_data import CaptionedImages
from clip_evaluation import TOP1, Encoder, Score, to_floats
from clip_step import (
    METHODS,
    OTHER_RULES,
    autocast,
    count_operations,
    learning_rate,
    make_drop,
    make_optimizer,
    now,
    set_learning_rate,
    train_step,
)
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import gaussmask

pd.options.display.width = 120  # so that a terminal shows the result table unbroken

COLUMNS = ("masked inference", "unmasked", "after tuning")  # of the papers' tables
CURVE_IMAGES, CURVE_POINTS = 1000, 8  # so many of the test set are evaluated, so often in a training


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on besides its data, method and seed.

    Args:
        mask_ratio: share of the patches that FLIP and GLIP drop in training.
        sigma: of GLIP, see `gaussmask.GaussianPatchDropout`.
        sampling: of GLIP, likewise.
        width: of both towers; an attention head is `head_width` wide.
        depth: of the image tower.
        text_depth: of the text tower.
        embed_dim: of the joint space.
        epochs: passes over the training set with masks.
        tuning_epochs: passes without masks afterwards; a fraction is part of a pass.
        precision: `"bf16"` (autocast), `"fp32"`, or `"auto"` for the faster of the two on this device.
    """

    mask_ratio: float = 0.75
    sigma: float = 0.2
    sampling: str = "additive"
    image_size: int = 32
    patch_size: int = 4
    width: int = 192
    depth: int = 6
    text_depth: int = 4
    head_width: int = 64
    embed_dim: int = 128
    context_length: int = 16
    batch_size: int = 512
    epochs: float = 4
    tuning_epochs: float = 1
    lr: float = 1e-3
    tuning_lr: float = 1e-4
    weight_decay: float = 0.1
    warmup: float = 0.1
    precision: str = "auto"
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")


TrainStep = Callable[..., Tensor]  # with the arguments and the result of `clip_step.train_step`


class CLIP(nn.Module):
    """An image tower and a text tower with the interface of open_clip's models."""

    def __init__(self, visual: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.text = text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        features: Tensor = self.visual(images).float()
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        features: Tensor = self.text(tokens).float()
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.encode_image(images, True), self.encode_text(tokens, True), self.logit_scale.exp()


def build_model(config: Config) -> CLIP:
    """A timm ViT and open_clip's text transformer, small enough for a CPU, with random weights."""
    visual = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.width // config.head_width,
        num_classes=config.embed_dim,
    )
    text = TextTransformer(
        context_length=config.context_length,
        vocab_size=tokenizer(config.context_length).vocab_size,
        width=config.width,
        heads=config.width // config.head_width,
        layers=config.text_depth,
        output_dim=config.embed_dim,
    )
    return CLIP(visual, text).to(config.device)


@functools.cache
def tokenizer(context_length: int) -> open_clip.tokenizer.SimpleTokenizer:
    """CLIP's byte-pair tokenizer; open_clip ships its vocabulary."""
    return open_clip.tokenizer.SimpleTokenizer(context_length=context_length)


@functools.lru_cache(maxsize=4)
def _tokens(captions: tuple[str, ...], context_length: int) -> Tensor:
    """Once for training, tuning and all runs on the same data: 30,000 captions take 2 s."""
    return tokenizer(context_length)(captions)


def train(
    model: CLIP,
    data: CaptionedImages,
    config: Config,
    *,
    epochs: float,
    lr: float,
    seed: int,
    label: str,
    curve_data: CaptionedImages | None = None,
    curve_steps: int | None = None,
    score: Score = TOP1,
    advance: Callable[[int], object] | None = None,
    step_on: TrainStep = train_step,
) -> list[dict[str, float]]:
    """Train for `epochs` passes over `data`, whose order depends on `seed` alone.

    Args:
        label: of the progress bar.
        curve_data: evaluated, as whole images, after every `curve_steps` (by default every pass), and at the end.
        score: of `curve_data`.
        advance: told after every step how many images it took, in place of a progress bar.
        step_on: what makes a step of a batch.

    Returns:
        One record per step: `samples` seen so far, `seconds` of training so far and `images_per_second` of the step
        (both without loading and evaluating), `loss`, and `score` where `curve_data` was evaluated.
    """
    loader = torch.utils.data.DataLoader(
        _Rows(len(data)),
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda batch: batch,
        generator=torch.Generator().manual_seed(seed),
    )
    if len(loader) == 0:
        raise ValueError(f"a batch of {config.batch_size} needs at least as many training images, got {len(data)}")
    num_steps = max(1, round(epochs * len(loader)))
    optimizer = make_optimizer(model.parameters(), lr=lr, weight_decay=config.weight_decay)
    num_warmup = max(1, round(config.warmup * num_steps))
    contrastive_loss = open_clip.loss.ClipLoss()
    all_images = data.images.to(config.device)
    all_tokens = _tokens(tuple(data.captions), config.context_length).to(config.device)
    curve_steps = curve_steps or len(loader)
    records, spent = [], 0.0
    total, hidden = num_steps * config.batch_size, None if advance is None else True
    with tqdm(total=total, desc=label, unit=" images", unit_scale=True, file=sys.stdout, disable=hidden) as bar:
        for step, rows in enumerate(_batches(loader, num_steps), start=1):
            model.train()
            on_device = rows.to(config.device)
            pixels, tokens = to_floats(all_images[on_device], config.device), all_tokens[on_device]
            set_learning_rate(optimizer, learning_rate(step - 1, num_steps=num_steps, num_warmup=num_warmup, peak=lr))
            started = now(config.device)
            precision = autocast(config.precision, config.device)
            loss = step_on(model, pixels, tokens, contrastive_loss, optimizer, precision).item()
            seconds = now(config.device) - started
            spent += seconds
            record = {
                "samples": step * config.batch_size,
                "seconds": spent,
                "loss": loss,
                "images_per_second": config.batch_size / seconds,
            }
            if curve_data is not None and (step % curve_steps == 0 or step == num_steps):
                record["score"] = score.of(make_encoder(model, config), curve_data)
            records.append(record)
            if advance is not None:
                advance(config.batch_size)
            bar.update(config.batch_size)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return records


class _Rows(torch.utils.data.Dataset[Any]):
    """The numbers of all images; a batch of them is a tensor."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows)


def _batches(loader: Any, num_steps: int) -> Iterator[Any]:
    passes = itertools.chain.from_iterable(itertools.repeat(loader))
    return itertools.islice(passes, num_steps)


def make_encoder(model: CLIP, config: Config) -> Encoder:
    """What the evaluation needs to know of a model."""
    return Encoder(model, tokenizer(config.context_length), config.device, config.precision)


def pretrain_and_tune(
    model: CLIP,
    data: CaptionedImages,
    config: Config,
    seed: int,
    *,
    evaluate: Callable[[str, Encoder], None],
    reveal: Callable[[], object],
    tuning_data: CaptionedImages | None = None,
    label: str = "",
    curve_data: CaptionedImages | None = None,
    curve_steps: int | None = None,
    score: Score = TOP1,
    advance: Callable[[int, bool], object] | None = None,
    step_on: TrainStep = train_step,
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The papers' protocol: train on few tokens, evaluate, tune for a short while on all tokens, evaluate again.

    Args:
        evaluate: called with a column of the papers' tables and the model: `"masked inference"` and `"unmasked"` after
            the training, `"after tuning"` after the tuning, if there is one.
        reveal: called between the first two; makes the model train on whole images from then on.
        tuning_data: if it differs from `data`, as for a model that was trained on smaller images.
        curve_data, curve_steps, score: see `train`.
        advance: likewise, with True as the second argument in the tuning.
        step_on: likewise, of the training alone.

    Returns:
        The records of `train`, of the training and of the tuning.
    """
    encoder = make_encoder(model, config)
    curve: dict[str, Any] = {"curve_data": curve_data, "curve_steps": curve_steps, "score": score}

    def told(tuning: bool) -> Any:
        return None if advance is None else lambda images: advance(images, tuning)

    training = train(
        model,
        data,
        config,
        epochs=config.epochs,
        lr=config.lr,
        seed=seed,
        label=label,
        advance=told(False),
        step_on=step_on,
        **curve,
    )
    evaluate("masked inference", encoder)
    reveal()
    evaluate("unmasked", encoder)
    if config.tuning_epochs <= 0:
        return training, []
    tuning = train(
        model,
        data if tuning_data is None else tuning_data,
        config,
        epochs=config.tuning_epochs,
        lr=config.tuning_lr,
        seed=seed + 1_000_000,
        label=f"{label}, unmasked tuning",
        advance=told(True),
        **curve,
    )
    evaluate("after tuning", encoder)
    return training, tuning


def run(
    method: str,
    train_data: CaptionedImages,
    test_data: CaptionedImages,
    config: Config,
    seed: int,
    *,
    score: Score = TOP1,
    curve_points: int = CURVE_POINTS,
    advance: Callable[[int, bool], object] | None = None,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """`pretrain_and_tune` one model with masks.

    The initial weights and the order of the batches depend on `seed` only, not on the method. CLIP, which has no mask,
    goes through the tuning too, so that all methods have seen equally many images in every column.

    Args:
        score: of the columns and the curve.
        curve_points: evaluations in the training, beside those of the columns; with any, the tuning ends with one too.
        advance: see `pretrain_and_tune`.

    Returns:
        The row of results, and the records of `train` as a table.
    """
    torch.manual_seed(seed)
    model = build_model(config)
    drop = make_drop(method, config.mask_ratio, sigma=config.sigma, sampling=config.sampling)
    if drop is not None:
        gaussmask.attach(model.visual, drop)
    scores = dict.fromkeys(COLUMNS, math.nan)

    def evaluate(column: str, encoder: Encoder) -> None:
        masked = column == "masked inference"
        if not masked or drop is not None:
            scores[column] = score.of(encoder, test_data, masked=masked)

    def reveal() -> None:
        if drop is not None:
            drop.mask_ratio = 0.0

    training, tuning = pretrain_and_tune(
        model,
        train_data,
        config,
        seed,
        evaluate=evaluate,
        reveal=reveal,
        label=f"{method}, seed {seed}",
        curve_data=test_data.head(CURVE_IMAGES) if curve_points else None,
        curve_steps=math.ceil(config.epochs * (len(train_data) // config.batch_size) / max(1, curve_points)),
        score=score,
        advance=advance,
    )
    before = {name: training[-1][name] for name in ("samples", "seconds")}
    later = [{**record, **{name: record[name] + spent for name, spent in before.items()}} for record in tuning]
    curve = pd.DataFrame([*training, *later])
    speed = pd.Series([record["images_per_second"] for record in training]).median()
    result = {"method": method, "seed": seed, **scores, "images/s": speed}
    return result, curve.assign(method=method, seed=seed)


@functools.cache
def operations(config: Config, method: str) -> int:
    """Of a step per image and caption: the same on every machine."""
    model = build_model(replace(config, device="cpu")).to("meta").train()
    drop = make_drop(method, config.mask_ratio, sigma=config.sigma, sampling=config.sampling)
    if drop is not None:
        gaussmask.attach(model.visual, drop)
    images = torch.zeros(1, 3, config.image_size, config.image_size, device="meta")
    return count_operations(model, images, torch.zeros(1, config.context_length, dtype=torch.long, device="meta"))


def plot_curves(curves: pd.DataFrame, smoothing: int = 10, score: str = TOP1.name, over: str = "samples") -> Figure:
    """Training loss, and the score on whole images, over the `samples` seen or the `seconds` of training, by seed."""
    figure, (loss_axes, score_axes) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    methods = [*METHODS, *OTHER_RULES]  # a colour for each, whichever are there
    for (method, seed), curve in curves.groupby(["method", "seed"], sort=False):
        style: dict[str, Any] = {"color": f"C{methods.index(str(method))}", "alpha": 0.8}
        style["label"] = method if seed == curves["seed"].iloc[0] else None
        loss_axes.plot(curve[over], curve["loss"].rolling(smoothing, min_periods=1).mean(), linewidth=1, **style)
        scores = curve.dropna(subset="score")
        score_axes.plot(scores[over], scores["score"], marker="o", markersize=3, linewidth=1, **style)
    label = {"samples": "images seen", "seconds": "seconds of training"}[over]
    loss_axes.set(xlabel=label, ylabel="contrastive loss", title="training (masked until the tuning)")
    title = "zero-shot, whole images" if score == TOP1.name else "retrieval, whole images"
    score_axes.set(xlabel=label, ylabel=f"{score} (%)", title=title)
    score_axes.legend()
    for axes in (loss_axes, score_axes):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure
