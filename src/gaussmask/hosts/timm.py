"""timm: a plain ViT is one row. The row says which seam puts the drop in, and where the patches and tokens are."""

from typing import Any

from ..seams.biases import BeitBiases, RelPosBiases
from ..seams.embeddings import LatePrefixSeam, TimmHookSeam
from ..seams.host import OWN_GRIDS, Host
from ..seams.own_grids import PositionsInOutputSeam
from ..seams.patch_dropout import NaFlexSeam, TimmSeam, TimmTupleSeam


def _num_prefix_tokens(model: Any) -> int:
    return int(model.num_prefix_tokens)


def _soft_pool(encoder: Any) -> str | None:
    if encoder.global_pool != "soft":
        return None
    return "its soft pooling averages k x k patches of the full grid: build it with global_pool='avg'"


HOSTS: dict[str, Host] = {
    "VisionTransformer": Host(TimmSeam, "patch_embed", _num_prefix_tokens),
    "Eva": Host(TimmTupleSeam, "patch_embed", _num_prefix_tokens),
    "NaFlexVit": Host(NaFlexSeam, "embeds", _num_prefix_tokens, note=f"{OWN_GRIDS} No masking in eval mode."),
    "Cait": Host(TimmHookSeam, "patch_embed", 0, tokens="pos_drop", note="The class token joins in later layers."),
    "Beit": Host(TimmHookSeam, "patch_embed", 1, tokens="pos_drop", followers={"Beit": BeitBiases}),
    "VisionTransformerRelPos": Host(
        LatePrefixSeam, "patch_embed", _num_prefix_tokens, tokens="patch_embed",
        followers={"VisionTransformerRelPos": RelPosBiases},
    ),
    "Gemma4VitEncoder": Host(
        PositionsInOutputSeam, "patch_embed", 0, tokens="patch_embed", refuse=_soft_pool,
        note=f"{OWN_GRIDS} Pooling 'avg' or none.",
    ),
}  # fmt: skip
