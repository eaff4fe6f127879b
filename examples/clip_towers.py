"""CLIP models by name: open_clip's own, or with an image tower of timm or transformers; and how they are saved.

A trained model is a folder in open_clip's format (`open_clip_config.json`, `open_clip_model.safetensors`), which plain
open_clip opens; the image tower lies beside it by itself for plain timm or transformers.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
import safetensors.torch
import timm
import timm.models
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from torch import Tensor, nn
from torch.nn import functional as F
from user_errors import UserError


def model_config(
    name: str, *, image_tower: str | None = None, image_size: int | None = None, siglip: bool = False
) -> dict[str, Any]:
    """open_clip's configuration of a model.

    Args:
        name: of a model of open_clip, such as `"ViT-B-16"`, or a .json file or a folder in its format.
        image_tower: `"timm:NAME"` or `"transformers:NAME"` (or a folder with a config.json) instead of the image tower
            of `name`, with random weights.
        image_size: instead of that of `name`.
        siglip: give it the bias and the scale that SigLIP starts from, if it has none.
    """
    if name.endswith(".json"):
        config = json.loads(Path(name).read_text(encoding="utf-8"))
    elif Path(name).is_dir():
        config = json.loads((Path(name) / HF_CONFIG_NAME).read_text(encoding="utf-8"))["model_cfg"]
    else:
        config = open_clip.get_model_config(name)
        if config is None:
            raise UserError(
                f"unknown model {name!r}: take a name of open_clip.list_models(), for example ViT-B-16, or the path of "
                "a .json file in its format"
            )
    if "multimodal_cfg" in config:
        raise UserError(f"{name} also learns to caption, with a loss of its own: train it with open_clip_glip.py")
    if image_tower is not None:
        library, _, tower = image_tower.partition(":")
        size = config["vision_cfg"].get("image_size", 224)
        if library == "timm" and tower:
            config["vision_cfg"] = {
                "timm_model_name": tower,
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": size,
            }
        elif library == "transformers" and tower:
            config["vision_cfg"] = {"transformers_model_name": tower, "image_size": size}
        else:
            raise UserError(f"image_tower must be timm:NAME or transformers:NAME, got {image_tower!r}")
        config["custom_text"] = True
    if image_size is not None:
        config["vision_cfg"]["image_size"] = image_size
    if siglip and config.get("init_logit_bias") is None:
        config |= {"init_logit_bias": -10.0, "init_logit_scale": 2.302585}  # arXiv 2303.15343, section 3.2
    return config


def create_model(config: Mapping[str, Any], weights: Path | None = None) -> Any:
    """A model of open_clip.

    Args:
        config: see `model_config`.
        weights: a file of weights of this model, or a folder that `save_model` wrote: then images are normalised as
            they were there, and positions are interpolated if images had another size. Random weights without it.
    """
    vision = dict(config["vision_cfg"])
    size = saved_size = vision.get("image_size", 224)
    preprocessing = open_clip.transform.PreprocessCfg()
    if weights is not None and (weights / HF_CONFIG_NAME).is_file():
        saved = json.loads((weights / HF_CONFIG_NAME).read_text(encoding="utf-8"))
        saved_size = saved["model_cfg"]["vision_cfg"].get("image_size", size)
        preprocessing = open_clip.transform.PreprocessCfg(**saved["preprocess_cfg"])
    tower = vision.get("transformers_model_name")
    if tower is not None:
        vision = {"layers": 1, "width": 64, "image_size": size}  # makes way for the tower
    arguments = {**config, "vision_cfg": vision}
    custom = arguments.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    with quiet():
        model: Any = (open_clip.CustomTextCLIP if custom else CLIP)(**arguments)
        take_short_captions(model.text if custom else model)
        if tower is not None:
            model.visual = TransformersTower(tower, config["embed_dim"], size)
        resize = getattr(model.visual, "set_input_size", None)  # of timm's towers; open_clip interpolates its own
        if resize is not None:
            resize(saved_size)
        if weights is not None:
            load_weights(model, weights)
        if resize is not None:
            resize(size)
        open_clip.model.set_model_preprocess_cfg(model, vars(preprocessing) | {"size": size})
    return model


class CLIP(open_clip.CLIP):  # type: ignore[misc]  # open_clip has no types
    """open_clip's, whose text tower also takes captions that are shorter than its context."""

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Features (B, D) of tokens (B, L), with the first L of the positions."""
        if text.shape[1] == self.context_length:
            features: Tensor = super().encode_text(text, normalize=normalize)
            return features
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(dtype) + self.positional_embedding[: text.shape[1]].to(dtype)
        x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask))
        eos = {"eos_token_id": self.text_eos_id} if self.text_pool_type == "eos" else {}
        x = open_clip.transformer.text_global_pool(x, text, self.text_pool_type, **eos)
        if self.text_projection is not None:
            linear = isinstance(self.text_projection, nn.Linear)
            x = self.text_projection(x) if linear else x @ self.text_projection
        return F.normalize(x, dim=-1) if normalize else x


def take_short_captions(tower: nn.Module) -> None:
    """Let a text tower of open_clip take tokens (B, L) of fewer positions than its context; others do so already."""
    transformer = getattr(tower, "transformer", None)
    if isinstance(transformer, open_clip.transformer.Transformer):
        transformer.register_forward_pre_hook(_cut_attention_mask, with_kwargs=True)


def _cut_attention_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of the causal mask of the whole context, what the tokens at hand need."""
    mask, length = kwargs.get("attn_mask"), args[0].shape[1]
    if mask is None or mask.shape[-1] == length:
        return None
    return args, {**kwargs, "attn_mask": mask[..., :length, :length]}


def load_weights(model: nn.Module, weights: Path) -> None:
    file = weights / HF_SAFE_WEIGHTS_NAME if weights.is_dir() else weights
    if not file.is_file():
        raise UserError(f"there are no weights at {weights}")
    try:
        open_clip.load_checkpoint(model, str(file))
    except (RuntimeError, KeyError, AssertionError) as error:
        first = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise UserError(f"{file} holds weights of another model than the one asked for: {first[:200]}") from error


def save_model(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Leave a model for plain open_clip, and its image tower for plain timm or transformers.

    `open_clip.create_model("local-dir:FOLDER")`, `timm.create_model("local-dir:FOLDER/timm", pretrained=True)`,
    `transformers.AutoModel.from_pretrained("FOLDER/transformers")`. (A timm tower at another image size than its own
    takes two lines in open_clip: `create_model(..., load_weights=False, force_image_size=SIZE)`, then
    `load_checkpoint(model, FILE)`. open_clip knows no towers of transformers, so such a model opens there in no way.)
    """
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(dict(weights), folder / HF_SAFE_WEIGHTS_NAME)
    model = create_model(config, folder)
    preprocessing = {key: model.visual.preprocess_cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    (folder / HF_CONFIG_NAME).write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}, indent=2) + "\n", encoding="utf-8"
    )
    if isinstance(model.visual, TransformersTower):
        model.visual.trunk.save_pretrained(folder / "transformers")
    elif hasattr(model.visual, "trunk"):
        size = model.visual.image_size
        args = {"img_size": size} if size != model.visual.trunk.default_cfg["input_size"][1:] else {}
        timm.models.save_for_hf(model.visual.trunk, str(folder / "timm"), model_args=args, safe_serialization=True)


def make_tokenizer(config: Mapping[str, Any], **more: Any) -> Any:
    """open_clip's tokenizer for the text tower; `more` are options of the tokenizer's class."""
    text = config["text_cfg"]
    length = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    if "hf_tokenizer_name" in text:
        options = text.get("tokenizer_kwargs", {})
        return open_clip.tokenizer.HFTokenizer(text["hf_tokenizer_name"], context_length=length, **options, **more)
    return open_clip.tokenizer.SimpleTokenizer(context_length=length, **more)


class TransformersTower(nn.Module):
    """An image tower of transformers with the interface of open_clip's: pooled output, then a projection.

    Args:
        name: of a model on the hub, or a folder with a config.json; of a model of two towers, the image tower.
    """

    def __init__(self, name: str, embed_dim: int, image_size: int) -> None:
        super().__init__()
        import transformers  # an image tower of its own is the only thing that needs it

        config = transformers.AutoConfig.from_pretrained(name)
        config = getattr(config, "vision_config", config)
        config.image_size = image_size
        self.trunk = transformers.AutoModel.from_config(config)
        self.proj = nn.Linear(config.hidden_size, embed_dim, bias=False)
        self.image_size = (image_size, image_size)

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.trunk(pixel_values=images)
        pooled = getattr(outputs, "pooler_output", None)
        features: Tensor = self.proj(outputs.last_hidden_state[:, 0] if pooled is None else pooled)
        return features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            self.trunk.gradient_checkpointing_enable()
        else:
            self.trunk.gradient_checkpointing_disable()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without open_clip's remarks on weights that are random on purpose."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
