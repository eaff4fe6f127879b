"""Part clip: images per second of CLIP training, each method at the largest batch that fits into memory."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import open_clip
import torch
from clip_towers import take_short_captions
from measure.arithmetic import Tower, clip_ceiling
from measure.memory import MIB, peak_mib
from measure.timing import Contender
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import gaussmask
from gaussmask.functional import num_kept_patches
from part.groups import Group
from part.sizes import Sizes

REFERENCE = "no mask"
SECONDS_PER_MIB = 0.006  # that a round may cost on 2 CPU cores, for the progress bar


class CLIP(nn.Module):
    """timm's ViT, open_clip's text transformer, and the temperature."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.visual: Any = sizes.image.build()
        self.text = TextTransformer(**sizes.text)
        take_short_captions(self.text)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = [F.normalize(tower.float(), dim=-1) for tower in (self.visual(images), self.text(texts))]
        return features[0], features[1], self.logit_scale.exp()

    @property
    def towers(self) -> tuple[Tower, Tower]:
        """What the arithmetic needs to know of the two."""
        vit, text = self.visual, self.text
        patches = vit.patch_embed.num_patches
        values = vit.patch_embed.proj.weight[0].numel()
        return (
            Tower(vit.num_prefix_tokens + patches, vit.embed_dim, len(vit.blocks), patches, values),
            Tower(text.context_length, text.width, len(text.transformer.resblocks)),
        )


class Trainer:
    """One model and optimizer for all methods: only the drop on the image tower changes, and the batch."""

    def __init__(self, sizes: Sizes, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.model = CLIP(sizes).to(device).train()
        self.loss = open_clip.loss.ClipLoss()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.images = self.texts = torch.empty(0)

    def inputs(self, batch: int, caption_tokens: int | None = None) -> None:
        """Make images and texts, in the place of those that were there; whole captions if no length is given."""
        self.images = self.texts = torch.empty(0)
        self.optimizer.zero_grad(set_to_none=True)  # of a step that ran out of memory
        if self.device == "cuda":
            # Blocks that another batch left in the allocator's cache do not fit: without this they would be given back
            # and allocated anew within the timed step, or be in its way.
            torch.cuda.empty_cache()
        height, width = self.model.visual.patch_embed.img_size
        text = self.model.text
        self.images = torch.randn(batch, 3, height, width, device=self.device)
        self.texts = torch.randint(text.vocab_size, (batch, caption_tokens or text.context_length), device=self.device)

    @property
    def inputs_mib(self) -> float:
        return (self.images.nbytes + self.texts.nbytes) / MIB

    def mask(self, mask_ratio: float, stage: str | None) -> None:
        """Attach what the method at hand drops; nothing for `stage=None`."""
        gaussmask.detach(self.model.visual)
        if stage is not None:
            gaussmask.attach(self.model.visual, gaussmask.GaussianPatchDropout(mask_ratio), stage=stage)

    def step(self) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            features = self.model(self.images, self.texts)
        self.loss(*features).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def resident_mib(self) -> float:
        """The weights and AdamW's two moments."""
        return 3 * sum(parameter.nbytes for parameter in self.model.parameters()) / MIB


def largest_batch(peak: Callable[[int], float], budget: float) -> int:
    """The largest batch whose `peak` stays within `budget`, to 2 %; to 3 % where the memory ends before the budget.

    The peak is affine in the batch as soon as activations outweigh gradients, and grows more slowly before. So each
    step extrapolates the latest two peaks, to no more than twice the batch, until nothing is left to gain.
    """
    low, high = 1, 2
    low_peak, high_peak = peak(low), peak(high)
    if high_peak > budget:
        raise ValueError(f"a step of batch 2 takes {high_peak:.0f} MiB, and only {budget:.0f} MiB are left for it")
    while True:
        per_image = max((high_peak - low_peak) / (high - low), 1e-6)
        guess = min(2 * high, high + math.floor((budget - high_peak) / per_image))
        if high_peak > budget:
            return guess  # the peak is convex: between two batches it lies below the line
        if guess <= 1.02 * high:
            return high
        low, low_peak = high, high_peak
        high, high_peak = in_memory(guess, peak)
        if high < guess:
            return high


def in_memory(batch: int, do: Callable[[int], float]) -> tuple[int, float]:
    """Do something with `batch`, or 3 % less, and so on, until the memory suffices; the batch, and what came of it.

    A GPU's allocator has to reserve more than the peak: its blocks do not fit without a gap.

    Raises:
        torch.OutOfMemoryError: that of a batch of 2, where not even this fits.
    """
    while True:
        try:
            return batch, do(batch)
        except torch.OutOfMemoryError:
            if batch <= 2:
                raise
        batch = max(2, math.floor(0.97 * batch))


def contenders(
    sizes: Sizes,
    mask_ratio: float,
    stages: Sequence[str],
    caption_tokens: Sequence[int],
    device: str,
    dtype: torch.dtype,
    budget_mib: float | None,
    batches: dict[Any, int],
) -> list[Contender]:
    """One without a mask on whole captions, and one per stage and length of the captions.

    Args:
        batches: what was found before, by setting: the batch without a mask is the same at every ratio.
    """
    if budget_mib is None:
        budget_mib = 0.9 * torch.cuda.mem_get_info()[0] / MIB
    trainer = Trainer(sizes, device, dtype)
    trainer.inputs(1)
    trainer.step()
    image, text = trainer.model.towers
    dropped = image.projected - num_kept_patches(image.projected, mask_ratio)

    def contender(stage: str | None, length: int) -> Contender:
        def peak(batch: int) -> float:
            trainer.inputs(batch, length)
            return peak_mib(trainer.step, device) + trainer.inputs_mib

        setting = (stage, stage and mask_ratio, length)
        trainer.mask(mask_ratio, stage)
        if setting not in batches:
            largest = largest_batch(peak, budget_mib - trainer.resident_mib)
            batches[setting] = in_memory(largest, peak)[0] if device == "cuda" else largest
        batch = batches[setting]

        def prepare() -> None:
            trainer.mask(mask_ratio, stage)
            trainer.inputs(batch, length)
            if device == "cuda":
                trainer.step()  # which fills the allocator's cache

        name = REFERENCE if stage is None else f"gaussmask {stage}"
        name += "" if length == text.tokens else f", {length} caption tokens"
        ceiling = 1.0
        if stage is not None:
            ceiling = clip_ceiling(image, text, dropped=dropped, stage=stage, caption_tokens=length)
        return Contender(name, trainer.step, batch, prepare, {"ceiling": ceiling, "caption_tokens": length})

    lengths = caption_tokens or (text.tokens,)
    return [contender(None, text.tokens), *(contender(stage, length) for length in lengths for stage in stages)]


def groups(
    sizes: Sizes,
    *,
    ratios: Sequence[float],
    stages: Sequence[str],
    caption_tokens: Sequence[int] = (),
    device: str,
    dtype: torch.dtype,
    budget_mib: float | None,
    rounds: int,
) -> list[Group]:
    """One group per ratio; eager mode, for a compiled model could not change its drop.

    Args:
        caption_tokens: lengths of the captions beside a mask; whole ones if none is given.
        budget_mib: memory for weights, gradients, moments and activations; None is nine tenths of what is free on
            the GPU.
    """
    found = []
    batches: dict[Any, int] = {}
    seconds = SECONDS_PER_MIB * (budget_mib or 5000) * (1 + max(1, len(caption_tokens)) * len(stages)) / 3
    for mask_ratio in ratios:
        keys: dict[str, Any] = {
            "part": "clip",
            "model": f"CLIP {sizes.image.name}",
            "dtype": str(dtype).removeprefix("torch."),
        }
        keys |= {"mask_ratio": mask_ratio, "mode": "eager", "pass": "training step"}
        build = functools.partial(
            contenders, sizes, mask_ratio, stages, caption_tokens, device, dtype, budget_mib, batches
        )
        found.append(Group(keys, build, REFERENCE, REFERENCE, rounds, seconds))
    return found
