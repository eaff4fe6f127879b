"""CLIP training with random, centred or no masking of the images: the loop that all examples share.

    images   -> patches -> tokens -> drop -> kept tokens -> image features --.
                                                                              > contrastive loss
    captions -> text tokens ------------------------------> text features  --'

`compare` trains CLIP (no mask), FLIP (random) and GLIP (centred) from the same initial weights on the same batches,
tunes them unmasked for a short while, and evaluates each in the three columns of the papers: zero-shot with masked
images, with whole images, and after tuning.
"""

import functools
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import matplotlib.pyplot as plt
import open_clip
import pandas as pd
import timm
import torch
from clip_data import CaptionedImages
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import gaussmask

pd.options.display.width = 120  # so that a terminal shows the result table unbroken

METHODS = ("clip", "flip", "glip")
CURVE_IMAGES = 1000  # of the test set are evaluated after every pass


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on besides its data, method and seed.

    Args:
        mask_ratio: share of the patches that FLIP and GLIP drop in training.
        sigma, sampling: of GLIP, see `gaussmask.GaussianPatchDropout`.
        width, depth, text_depth: of the towers; an attention head is `head_width` wide.
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


def make_drop(method: str, config: Config) -> gaussmask.PatchDropout | None:
    """What `method` drops: nothing (`"clip"`), random patches (`"flip"`) or those far from the centre (`"glip"`)."""
    if method == "clip":
        return None
    if method == "flip":
        return gaussmask.RandomPatchDropout(config.mask_ratio)
    if method == "glip":
        return gaussmask.GaussianPatchDropout(config.mask_ratio, config.sigma, sampling=config.sampling)
    raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def to_floats(images: Tensor, device: str) -> Tensor:
    """uint8 (B, 3, H, W) to floats around 0."""
    return images.to(device, non_blocking=True).float().div_(127.5).sub_(1)


def train_step(
    model: CLIP,
    images: Tensor,
    tokens: Tensor,
    contrastive_loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    autocast: AbstractContextManager[Any],
) -> Tensor:
    """One optimizer step on one batch; the mask is drawn inside the image tower. Returns the loss."""
    with autocast:
        image_features, text_features, logit_scale = model(images, tokens)
    loss: Tensor = contrastive_loss(image_features, text_features, logit_scale)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))  # as CLIP does
    return loss.detach()


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
) -> list[dict[str, float]]:
    """Train for `epochs` passes over `data`, whose order depends on `seed` alone.

    Args:
        label: of the progress bar.
        curve_data: evaluated, as whole images, after every pass.

    Returns:
        One record per step: `samples` seen so far, `loss`, `images_per_second` of the step (loading not counted), and
        `top1` where `curve_data` was evaluated.
    """
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda batch: batch,
        generator=torch.Generator().manual_seed(seed),
    )
    if len(loader) == 0:
        raise ValueError(f"a batch of {config.batch_size} needs at least as many training images, got {len(data)}")
    num_steps = max(1, round(epochs * len(loader)))
    optimizer, schedule = make_optimizer(model, config, lr, num_steps)
    contrastive_loss = open_clip.loss.ClipLoss()
    tokenize = tokenizer(config.context_length)
    records = []
    bar = tqdm(total=num_steps * config.batch_size, desc=label, unit=" images", unit_scale=True, file=sys.stdout)
    with bar:
        for step, (images, captions) in enumerate(_batches(loader, num_steps), start=1):
            model.train()
            pixels, tokens = to_floats(images, config.device), tokenize(captions).to(config.device)
            started = _now(config.device)
            loss = train_step(model, pixels, tokens, contrastive_loss, optimizer, autocast(config)).item()
            seconds = _now(config.device) - started
            schedule.step()
            record = {
                "samples": step * config.batch_size,
                "loss": loss,
                "images_per_second": config.batch_size / seconds,
            }
            if curve_data is not None and (step % len(loader) == 0 or step == num_steps):
                record["top1"] = zero_shot_top1(model, curve_data, config)
            records.append(record)
            bar.update(config.batch_size)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return records


def make_optimizer(
    model: CLIP, config: Config, lr: float, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW without decay on vectors and scalars; linear warm-up and a cosine to 0, by steps."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    num_warmup = max(1, round(config.warmup * num_steps))
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (num_warmup + 1), total_iters=num_warmup)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, num_steps - num_warmup))
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[num_warmup])


def _batches(loader: Any, num_steps: int) -> Iterator[Any]:
    passes = itertools.chain.from_iterable(itertools.repeat(loader))
    return itertools.islice(passes, num_steps)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def autocast(config: Config) -> AbstractContextManager[Any]:
    """The precision of `config` as a context."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and _bf16_is_faster(config.device))
    return torch.autocast(config.device, torch.bfloat16, enabled=bf16)


@functools.cache
def _bf16_is_faster(device: str) -> bool:
    """Whether a matrix product is faster in bfloat16: many CPUs only emulate it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(1024, 1024, dtype=dtype, device=device)
        times = []
        for _ in range(5):
            started = _now(device)
            matrix @ matrix
            times.append(_now(device) - started)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < seconds[torch.float32]


@torch.no_grad()
def zero_shot_top1(model: CLIP, data: CaptionedImages, config: Config, *, masked: bool = False) -> float:
    """Share of the images, in percent, whose class open_clip's zero-shot classifier finds.

    Leaves the model in eval mode.

    Args:
        masked: drop patches as in training (the papers' "inference" column); otherwise the model sees whole images.
    """
    if data.labels is None or not data.classnames:
        raise ValueError("zero-shot evaluation needs labels and classnames")
    model.eval()
    drop = gaussmask.attached(model)
    if masked and drop is not None:
        drop.train()
    correct = 0
    with autocast(config):
        classifier = open_clip.build_zero_shot_classifier(
            model,
            tokenizer(config.context_length),
            data.classnames,
            [template.format for template in data.templates],
            num_classes_per_batch=None,
            device=config.device,
        )
        for images, labels in zip(data.images.split(500), data.labels.split(500), strict=True):
            features = model.encode_image(to_floats(images, config.device), normalize=True)
            with torch.autocast(config.device, enabled=False):  # bfloat16 would tie similar classes
                guesses = (features @ classifier).argmax(dim=1)
            correct += int((guesses.cpu() == labels).sum())
    return 100 * correct / len(data)


def run(
    method: str, train_data: CaptionedImages, test_data: CaptionedImages, config: Config, seed: int
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Train one model, evaluate it, tune it unmasked, and evaluate it again.

    The initial weights and the order of the batches depend on `seed` only, not on the method. CLIP, which has no mask,
    goes through the tuning too, so that all methods have seen equally many images in every column.

    Returns:
        The row of results, and the records of `train` as a table.
    """
    torch.manual_seed(seed)
    model = build_model(config)
    drop = make_drop(method, config)
    if drop is not None:
        gaussmask.attach(model.visual, drop)
    name = f"{method}, seed {seed}"
    curve_data = test_data.head(CURVE_IMAGES)
    records = train(
        model, train_data, config, epochs=config.epochs, lr=config.lr, seed=seed, label=name, curve_data=curve_data
    )
    speed = pd.Series([record["images_per_second"] for record in records]).median()
    masked = math.nan if drop is None else zero_shot_top1(model, test_data, config, masked=True)
    result = {
        "method": method,
        "seed": seed,
        "masked inference": masked,
        "unmasked": zero_shot_top1(model, test_data, config),
        "after tuning": math.nan,
        "images/s": speed,
    }
    if config.tuning_epochs > 0:
        if drop is not None:
            drop.mask_ratio = 0.0
        tuning = train(
            model,
            train_data,
            config,
            epochs=config.tuning_epochs,
            lr=config.tuning_lr,
            seed=seed + 1_000_000,
            label=f"{name}, unmasked tuning",
            curve_data=curve_data,
        )
        seen = records[-1]["samples"]
        records += [{**record, "samples": record["samples"] + seen} for record in tuning]
        result["after tuning"] = zero_shot_top1(model, test_data, config)
    return result, pd.DataFrame(records).assign(method=method, seed=seed)


def compare(
    train_data: CaptionedImages,
    test_data: CaptionedImages,
    config: Config,
    *,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0,),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`run` every method with every seed.

    Returns:
        The results, a row per run, with the speed-up over CLIP of the same seed; and the curves of all runs.
    """
    runs = [run(method, train_data, test_data, config, seed) for seed in seeds for method in methods]
    results = pd.DataFrame([result for result, _ in runs])
    if "clip" in methods:
        clip = results[results["method"] == "clip"].set_index("seed")["images/s"]
        results["speed-up"] = results["images/s"] / results["seed"].map(clip)
    return results, pd.concat([curve for _, curve in runs], ignore_index=True)


def summarize(results: pd.DataFrame) -> pd.DataFrame:
    """Mean ± standard deviation over the seeds, as text; the mean alone where there was one seed."""

    def cell(values: pd.Series) -> str:
        if values.isna().all():
            return "–"
        digits = 0 if values.name == "images/s" else 2 if values.name == "speed-up" else 1
        spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
        return f"{values.mean():.{digits}f}{spread}"

    grouped = results.groupby("method", sort=False)
    table = grouped[[column for column in results.columns if column not in ("method", "seed")]].agg(cell)
    return table.assign(seeds=grouped["seed"].count())


def plot_curves(curves: pd.DataFrame, smoothing: int = 10) -> Figure:
    """Training loss, and zero-shot accuracy on whole images, over the samples seen; a thin line per seed."""
    figure, (loss_axes, accuracy_axes) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for (method, seed), curve in curves.groupby(["method", "seed"], sort=False):
        style: dict[str, Any] = {"color": f"C{METHODS.index(method)}", "alpha": 0.8}
        style["label"] = method if seed == curves["seed"].iloc[0] else None
        loss_axes.plot(curve["samples"], curve["loss"].rolling(smoothing, min_periods=1).mean(), linewidth=1, **style)
        accuracy = curve.dropna(subset="top1")
        accuracy_axes.plot(accuracy["samples"], accuracy["top1"], marker="o", markersize=3, linewidth=1, **style)
    loss_axes.set(xlabel="images seen", ylabel="contrastive loss", title="training (FLIP and GLIP masked until tuning)")
    accuracy_axes.set(xlabel="images seen", ylabel="top-1 (%)", title="zero-shot, whole images")
    accuracy_axes.legend()
    for axes in (loss_axes, accuracy_axes):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure
