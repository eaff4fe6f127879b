"""open_clip: its own ViT is one row; towers of timm and transformers inside its models are rows of those."""

from ..seams.host import Host
from ..seams.patch_dropout import OpenClipSeam

HOSTS: dict[str, Host] = {
    "VisionTransformer": Host(OpenClipSeam, "conv1", 1, patch_dropout="patch_dropout"),
}
