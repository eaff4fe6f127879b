"""How many operations a transformer takes, and so how much faster CLIP can get at best with a masked image tower."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tower:
    """A plain transformer: `tokens` per sample, `width`, `depth` blocks, and an embedding.

    Args:
        projected: tokens that come out of a linear projection of `values` numbers each: patches.
    """

    tokens: int
    width: int
    depth: int
    projected: int = 0
    values: int = 0

    @property
    def flops(self) -> int:
        """Of one forward of one sample, a multiply-add counted as 2; norms, look-ups and the head left out.

        Per block: 8 N d^2 for queries, keys, values and the output, 16 N d^2 for the MLP of width 4 d, and 4 N^2 d for
        the attention.
        """
        block = 24 * self.tokens * self.width**2 + 4 * self.tokens**2 * self.width
        return self.depth * block + 2 * self.projected * self.values * self.width


def clip_ceiling(image: Tower, text: Tower, *, dropped: int, stage: str, caption_tokens: int | None = None) -> float:
    """Speed-up of both towers together when `dropped` patches cost nothing, and nothing else costs anything.

    Args:
        caption_tokens: that are left of `text.tokens`; all of them if not given.
        stage: `"tokens"`, where all patches are projected, or `"pixels"`, where the kept ones are.
    """
    projected = image.projected - (dropped if stage == "pixels" else 0)
    masked = replace(image, tokens=image.tokens - dropped, projected=projected)
    short = replace(text, tokens=caption_tokens or text.tokens)
    return (image.flops + text.flops) / (masked.flops + short.flops)
