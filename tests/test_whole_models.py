"""Whole models of transformers find their vision tower and train on fewer patches, and nothing behind the tower goes on
believing in all of them: contrastive, classifying, captioning, answering, encoder-decoder and two-tower models.
"""

import copy
import re
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hosts import (
    TEXT,
    TIMM_SIZE,
    VISION,
    VIT,
    VJEPA,
    YOLOS,
    Host,
    embeds,
    flattened_patches,
    images,
    logits,
    make_class,
    make_hf,
    pooler,
    rows_and_columns,
    spectrograms,
    videos,
)
from oracle import TOLERANCE, difference, masked_keys, randomise

import gaussmask
from gaussmask import RandomPatchDropout

loss = attrgetter("loss")
BARE, CLASS = ((0, 0),), ((1, 0),)


class Whole(NamedTuple):
    """How to build a whole model and call it, and where the patches show in what it returns.

    Args:
        make: makes the model, in training mode.
        inputs: batch size to keyword arguments.
        result: model output to what it is trained for.
        layouts: (front, back) numbers of tokens around the patches, for each attention over all patches; None where
            the patches are averaged, or seen by an attention of another kind.
        num_patches: N, of each image or clip.
    """

    make: Callable
    inputs: Callable
    result: Callable = loss
    layouts: tuple | None = CLASS
    num_patches: int = 36

    def build(self):
        """The model without dropouts of its own, and with weights under which every part counts."""
        model = Host.build(copy.deepcopy(self))  # for some configs empty the dictionaries that they are made of
        for module in model.modules():
            for name, value in list(vars(module).items()):
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
        randomise(model)
        return model


# What goes in. An image has QUERIES places in a prompt, each of them the token PLACE.

PLACE, QUERIES = 3, 4


def words(batch_size, name="input_ids", places=0, labels=False):
    tokens = torch.randint(4, 30, (batch_size, places + 8))
    tokens[:, :places] = PLACE
    tokens[:, -1] = 31  # the end of the text
    return {name: tokens, **({"labels": tokens.masked_fill(tokens == PLACE, -100)} if labels else {})}


def classes(batch_size):
    return {"labels": torch.arange(batch_size) % 2}


def boxes(batch_size):
    box = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.4]])}
    return {"labels": [box] * batch_size}


def place_mask(batch_size):
    return {"image_embeds_position_mask": words(batch_size, places=QUERIES)["input_ids"] == PLACE}


def pixel_mask(batch_size):
    return {"pixel_mask": torch.ones(batch_size, 48, 48, dtype=torch.long)}


def text_mask(batch_size, places=0):
    return {"attention_mask": torch.ones(batch_size, places + 8, dtype=torch.long)}


def two_images(batch_size):
    """Idefics input."""
    mask = torch.ones(batch_size, 8, 2, dtype=torch.long)
    return {"pixel_values": torch.randn(batch_size, 2, 3, 48, 48), "image_attention_mask": mask}


def two_padded_images(batch_size):
    """Idefics 2 input: images of different sizes, padded to 48 x 48."""
    mask = torch.zeros(batch_size, 2, 48, 48, dtype=torch.bool)
    mask[0, 0] = mask[:, 0, :40, :32] = mask[:, 1, :24, :24] = True
    return {"pixel_values": torch.randn(batch_size, 2, 3, 48, 48), "pixel_attention_mask": mask}


def padded_patches(batch_size):
    """Pix2Struct input, with the mask that its processor makes."""
    patches = rows_and_columns(batch_size)["flattened_patches"]
    return {"flattened_patches": patches, "attention_mask": (patches.sum(dim=-1) != 0).float()}


def together(*parts, **constants):
    return lambda batch_size: {key: value for part in parts for key, value in part(batch_size).items()} | constants


# What comes out


def last_words(path="last_hidden_state"):
    """Of a sequence with image tokens in front, the text."""
    return lambda output: attrgetter(path)(output)[:, -8:]


def tensors(output):
    """All tensors of an output, however deep they lie."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


# The models


def hf_model(model, inputs, result=loss, layouts=CLASS, num_patches=36, config=None, **settings):
    config = config or re.sub(r"(Model|For\w+)$", "Config", model)
    return Whole(partial(make_hf, model, config, settings), inputs, result, layouts, num_patches)


def pair(model, inputs=images, layouts=CLASS, **changes):
    return hf_model(model, together(inputs, words, return_loss=True), layouts=layouts, **{**PAIR, **changes})


def classifier(family, inputs=images, layouts=CLASS, num_patches=36, head="Image", **changes):
    settings = {**VISION, **changes}
    return hf_model(
        f"{family}For{head}Classification", together(inputs, classes), loss, layouts, num_patches, **settings
    )


def tower(family, model, config, inputs=images, result=pooler, **changes):
    return Whole(partial(make_class, family, model, config, "", {**VISION, **changes}), inputs, result)


WORDS = {**TEXT, "max_position_embeddings": 32}
PAIR = {"vision_config": VISION, "text_config": WORDS}
OPT = {**WORDS, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}
T5 = {
    "model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 32,
    "decoder_start_token_id": 0,
}  # fmt: skip
DECODER = {**WORDS, "is_decoder": True, "add_cross_attention": True}
RESAMPLED = {"vision_config": VISION, "qformer_config": WORDS, "text_config": OPT, "num_query_tokens": QUERIES}
QFORMER, VIDEO = {**RESAMPLED, "image_token_index": PLACE}, {**RESAMPLED, "video_token_index": PLACE}
RETRIEVAL = {**QFORMER, "qformer_config": {**WORDS, "use_qformer_text_input": True}}
GIT = {**WORDS, "vision_config": VISION}
KOSMOS = {"vision_config": VISION, "text_config": {**WORDS, "ffn_dim": 48}, "latent_query_num": QUERIES}
KOSMOS25 = {**KOSMOS, "vision_config": {
    **VISION, "patch_embed_hidden_size": 192, "head_dim": 16, "max_num_patches": 36,
}}  # fmt: skip
PERCEIVER = {"resampler_n_latents": QUERIES, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16}
IDEFICS = {
    **WORDS, "vision_config": {**VISION, "embed_dim": 32}, "freeze_text_layers": False, "freeze_vision_layers": False,
    "perceiver_config": PERCEIVER,
}  # fmt: skip
IDEFICS2 = {
    "vision_config": VISION, "text_config": {**WORDS, "model_type": "mistral", "num_key_value_heads": 2},
    "perceiver_config": {**PERCEIVER, "hidden_size": 32, "num_key_value_heads": 1}, "image_token_id": PLACE,
}  # fmt: skip
PIX2STRUCT = {
    "vision_config": {**VISION, "d_ff": 48, "d_kv": 16, "seq_len": 36, "patch_embed_hidden_size": 192},
    "text_config": {"hidden_size": 32, "d_ff": 48, "d_kv": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32},
}  # fmt: skip
BRIDGETOWER = {
    "vision_config": {**VISION, "hidden_size": 64}, "text_config": {**WORDS, "hidden_size": 64, "num_hidden_layers": 2},
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "contrastive_hidden_size": 32,
    "logit_scale_init_value": 2.6,
}  # fmt: skip
TIMM = {"architecture": VIT, "model_args": TIMM_SIZE}
PE = {"architecture": "vit_pe_core_tiny_patch16_384", "model_args": TIMM_SIZE, "num_labels": 8}
MGPSTR = {
    "image_size": [48, 48], "max_token_length": 4, "num_character_labels": 5, "num_bpe_labels": 5,
    "num_wordpiece_labels": 5,
}  # fmt: skip

caption, prompt = partial(words, labels=True), partial(words, places=QUERIES)
answer, question = partial(prompt, labels=True), partial(words, name="qformer_input_ids")
two_prompts, two_answers = partial(words, places=2 * QUERIES), partial(words, places=2 * QUERIES, labels=True)
clip, clip_of_two = partial(videos, name="pixel_values_videos"), partial(videos, frames=2)
itm = attrgetter("itm_score")
# fmt: off
MODELS = {
    # an image and a text, side by side
    "CLIPModel": pair("CLIPModel"),
    "SiglipModel": pair("SiglipModel", layouts=BARE),
    "Siglip2Model": pair("Siglip2Model", flattened_patches, BARE),
    "AltCLIPModel": pair("AltCLIPModel"),
    "ChineseCLIPModel": pair("ChineseCLIPModel"),
    "CLIPSegModel": pair("CLIPSegModel"),
    "MetaClip2Model": pair("MetaClip2Model"),
    "Aimv2Model": hf_model("Aimv2Model", together(images, words), attrgetter("logits_per_image"), BARE, **PAIR),
    "OwlViTModel": pair("OwlViTModel"),
    "Owlv2Model": pair("Owlv2Model"),
    "Tipsv2Model": pair("Tipsv2Model", layouts=((2, 0),)),
    "BlipModel": pair("BlipModel"),
    "BlipForImageTextRetrieval-contrastive": hf_model(
        "BlipForImageTextRetrieval", together(images, words, use_itm_head=False), itm, **PAIR),
    "Blip2ForImageTextRetrieval-contrastive": hf_model(
        "Blip2ForImageTextRetrieval", together(images, prompt, partial(text_mask, places=QUERIES)),
        attrgetter("logits_per_image"), **RETRIEVAL),
    "VisionTextDualEncoderModel": hf_model(
        "VisionTextDualEncoderModel", together(images, words, return_loss=True),
        vision_config={**VISION, "model_type": "vit"}, text_config={**WORDS, "model_type": "bert"}),
    # an image and a text, with attention between them
    "FlavaModel": hf_model(
        "FlavaModel", together(images, words, text_mask), last_words("multimodal_embeddings"), ((1, 0), (2, 8)),
        image_config=VISION, text_config=WORDS, multimodal_config=WORDS),
    "BlipForImageTextRetrieval": hf_model("BlipForImageTextRetrieval", together(images, words), itm, **PAIR),
    "BlipForQuestionAnswering": hf_model("BlipForQuestionAnswering", together(images, caption), **PAIR),
    "Blip2ForImageTextRetrieval": hf_model(
        "Blip2ForImageTextRetrieval",
        together(images, prompt, partial(text_mask, places=QUERIES), use_image_text_matching_head=True),
        attrgetter("logits_per_image"), **RETRIEVAL),
    "BridgeTowerModel": hf_model("BridgeTowerModel", together(images, words, pixel_mask), pooler, **BRIDGETOWER),
    "BridgeTowerForContrastiveLearning": hf_model(
        "BridgeTowerForContrastiveLearning", together(images, words, return_loss=True), **BRIDGETOWER),
    "BridgeTowerForImageAndTextRetrieval": hf_model(
        "BridgeTowerForImageAndTextRetrieval", together(images, words, classes), **BRIDGETOWER),
    "BridgeTowerForMaskedLM": hf_model("BridgeTowerForMaskedLM", together(images, caption), **BRIDGETOWER),
    # text about an image
    "BlipForConditionalGeneration": hf_model("BlipForConditionalGeneration", together(images, caption), **PAIR),
    "Blip2Model": hf_model("Blip2Model", together(images, answer), **QFORMER),
    "Blip2ForConditionalGeneration": hf_model("Blip2ForConditionalGeneration", together(images, answer), **QFORMER),
    "Blip2ForConditionalGeneration-t5": hf_model(
        "Blip2ForConditionalGeneration", together(images, answer), **{**QFORMER, "text_config": T5}),
    "InstructBlipModel": hf_model(
        "InstructBlipModel", together(images, prompt, question), last_words("language_model_outputs.last_hidden_state"),
        **QFORMER),
    "InstructBlipForConditionalGeneration": hf_model(
        "InstructBlipForConditionalGeneration", together(images, answer, question), **QFORMER),
    "InstructBlipVideoModel": hf_model(
        "InstructBlipVideoModel", together(clip_of_two, two_prompts, question),
        last_words("language_model_outputs.last_hidden_state"), **VIDEO),
    "InstructBlipVideoForConditionalGeneration": hf_model(
        "InstructBlipVideoForConditionalGeneration", together(clip_of_two, two_answers, question), **VIDEO),
    "GitModel": hf_model("GitModel", together(images, words), last_words(), ((1, 0), (1, 8)), **GIT),
    "GitForCausalLM": hf_model("GitForCausalLM", together(images, caption), layouts=((1, 0), (1, 8)), **GIT),
    "GitForCausalLM-video": hf_model(
        "GitForCausalLM", together(clip_of_two, caption), layouts=None, num_image_with_embedding=2, **GIT),
    "Kosmos2Model": hf_model(
        "Kosmos2Model", together(images, prompt, place_mask), last_words(), ((1, 0), (1, QUERIES)), **KOSMOS),
    "Kosmos2ForConditionalGeneration": hf_model(
        "Kosmos2ForConditionalGeneration", together(images, answer, place_mask), layouts=((1, 0), (1, QUERIES)),
        **KOSMOS),
    "Kosmos2_5Model": hf_model(
        "Kosmos2_5Model", together(rows_and_columns, prompt, place_mask), last_words(), ((0, 0), (0, QUERIES)),
        **KOSMOS25),
    "Kosmos2_5ForConditionalGeneration": hf_model(
        "Kosmos2_5ForConditionalGeneration", together(rows_and_columns, answer, place_mask),
        layouts=((0, 0), (0, QUERIES)), **KOSMOS25),
    "IdeficsModel": hf_model("IdeficsModel", together(two_images, words), last_words(), None, **IDEFICS),
    "IdeficsForVisionText2Text": hf_model(
        "IdeficsForVisionText2Text", together(two_images, caption), layouts=((1, 0), (1, QUERIES)), use_resampler=True,
        **IDEFICS),
    "Idefics2Model": hf_model(
        "Idefics2Model", together(two_padded_images, two_prompts), last_words(), ((0, 0), (0, QUERIES)), **IDEFICS2),
    "Idefics2ForConditionalGeneration": hf_model(
        "Idefics2ForConditionalGeneration", together(two_padded_images, two_answers),
        layouts=((0, 0), (0, QUERIES)), **IDEFICS2),
    "Pix2StructForConditionalGeneration": hf_model(
        "Pix2StructForConditionalGeneration", together(padded_patches, partial(words, name="labels")), layouts=BARE,
        **PIX2STRUCT),
    "VisionEncoderDecoderModel-gpt2": hf_model(
        "VisionEncoderDecoderModel", together(images, partial(words, name="labels")), decoder_start_token_id=0,
        pad_token_id=1, encoder={**VISION, "model_type": "vit"}, decoder={**DECODER, "model_type": "gpt2"}),
    "VisionEncoderDecoderModel-bert": hf_model(
        "VisionEncoderDecoderModel", together(images, partial(words, name="labels")), decoder_start_token_id=0,
        pad_token_id=1, encoder={**VISION, "model_type": "deit"}, decoder={**DECODER, "model_type": "bert"},
        layouts=((2, 0),)),
    "MgpstrForSceneTextRecognition": hf_model(
        "MgpstrForSceneTextRecognition", images, lambda output: torch.cat(output.logits, dim=-1), None,
        **{**VISION, **MGPSTR}),
    # classes and boxes
    "ViTForImageClassification": classifier("ViT"),
    "DeiTForImageClassification": classifier("DeiT", layouts=((2, 0),)),
    "DeiTForImageClassificationWithTeacher": hf_model(
        "DeiTForImageClassificationWithTeacher", images, logits, ((2, 0),), **VISION),
    "BeitForImageClassification": classifier("Beit", use_relative_position_bias=True, use_mean_pooling=False),
    "BeitForImageClassification-mean": classifier("Beit", layouts=None),
    "Data2VecVisionForImageClassification": classifier("Data2VecVision", layouts=None),
    "Dinov2ForImageClassification": classifier("Dinov2", layouts=None),
    "Dinov2WithRegistersForImageClassification": classifier("Dinov2WithRegisters", layouts=None),
    "ViTMSNForImageClassification": classifier("ViTMSN"),
    "IJepaForImageClassification": classifier("IJepa", layouts=None),
    "CLIPForImageClassification": classifier("CLIP", layouts=None, **PAIR),
    "MetaClip2ForImageClassification": classifier("MetaClip2", layouts=None, **PAIR),
    "SiglipForImageClassification": classifier("Siglip", layouts=None, **PAIR),
    "Siglip2ForImageClassification": classifier("Siglip2", flattened_patches, None, **PAIR),
    "TimmWrapperForImageClassification": hf_model(
        "TimmWrapperForImageClassification", together(images, classes), config="TimmWrapperConfig", num_labels=2,
        **TIMM),
    "ASTForAudioClassification": classifier(
        "AST", spectrograms, ((2, 0),), 20, "Audio", num_mel_bins=32, max_length=40, frequency_stride=8, time_stride=8),
    "VivitForVideoClassification": classifier(
        "Vivit", videos, CLASS, 72, "Video", num_frames=4, tubelet_size=[2, 8, 8]),
    "VideoMAEForVideoClassification": classifier("VideoMAE", videos, None, 72, "Video", num_frames=4),
    "VJEPA2ForVideoClassification": classifier("VJEPA2", clip, BARE, 72, "Video", **VJEPA),
    "YolosForObjectDetection": hf_model(
        "YolosForObjectDetection", together(images, boxes), layouts=((1, 3),), **{**VISION, **YOLOS}),
    # towers with something of their own around them
    "CLIPVisionModelWithProjection": hf_model(
        "CLIPVisionModelWithProjection", images, embeds, config="CLIPVisionConfig", **VISION),
    "MetaClip2VisionModelWithProjection": hf_model(
        "MetaClip2VisionModelWithProjection", images, embeds, config="MetaClip2VisionConfig", **VISION),
    "Blip2VisionModelWithProjection": hf_model(
        "Blip2VisionModelWithProjection", images, embeds, config="Blip2Config", **QFORMER),
    "BridgeTowerVisionModel": tower(
        "bridgetower", "BridgeTowerVisionModel", "BridgeTowerVisionConfig", partial(images, name="image"),
        lambda output: output[-1][:, 0], hidden_size=64),
    "Kosmos2VisionTransformer": tower("kosmos2", "Kosmos2VisionTransformer", "Kosmos2VisionConfig"),
    "OwlViTVisionTransformer": tower("owlvit", "OwlViTVisionTransformer", "OwlViTVisionConfig"),
    "Owlv2VisionTransformer": tower("owlv2", "Owlv2VisionTransformer", "Owlv2VisionConfig"),
    "PeVideoEncoder": hf_model(
        "PeVideoEncoder", partial(clip, frames=2), pooler, config="PeVideoEncoderConfig", vision_config=PE,
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16),
}
# fmt: on
PROJECTION = r"(patch_embed(ding)?|patch_projection|(embeddings|patch_embed)\.proj(ection)?)\.weight$"


def patch_projection(model):
    (weight,) = [weight for name, weight in model.named_parameters() if re.search(PROJECTION, name)]
    return weight


def run(model, inputs):
    torch.manual_seed(3)
    return model(**inputs)


def same(output, expected):
    both = list(zip(tensors(output), tensors(expected), strict=True))
    return bool(both) and all(torch.equal(one, other) for one, other in both)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_train_on_fewer_patches(name):
    """Half of the patches make a loss and a gradient of the patch projection, the same ones at the same seed; in eval
    mode and after `detach` the model is what it was.
    """
    whole = MODELS[name]
    model, inputs, drop = whole.build(), whole.inputs(2), RandomPatchDropout(0.5)
    before, evaluated = run(model, inputs), run(model.eval(), inputs)

    gaussmask.attach(model.train(), drop)
    output = run(model, inputs)
    assert drop.keep_indices.shape[-1] == whole.num_patches // 2
    goal = whole.result(output).sin().sum()
    goal.backward()
    gradient = patch_projection(model).grad
    assert goal.isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 1e-5

    assert same(run(model, inputs), output)
    assert not torch.equal(whole.result(output), whole.result(before))
    assert same(run(model.eval(), inputs), evaluated)
    assert drop.keep_indices is None
    assert same(run(gaussmask.detach(model).train(), inputs), before)


@pytest.mark.parametrize("name", [name for name, whole in MODELS.items() if whole.layouts is not None])
def test_nothing_behind_the_tower_believes_in_all_patches(name):
    """The loss is that of the full model in which every attention, also those behind the tower, is blind to the dropped
    patches.
    """
    whole, drop = MODELS[name], RandomPatchDropout(0.5)
    model, inputs = whole.build(), whole.inputs(3)
    full = copy.deepcopy(model).eval()
    result = whole.result(run(gaussmask.attach(model, drop), inputs))
    keep = torch.zeros(len(drop.keep_indices), whole.num_patches, dtype=torch.bool)
    with masked_keys(keep.scatter_(1, drop.keep_indices, True), whole.layouts):
        expected = whole.result(run(full, inputs))
    assert difference(result, expected) < TOLERANCE
    assert difference(result, whole.result(run(full, inputs))) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["GitForCausalLM", "GitForCausalLM-video"])
def test_git_counts_the_kept_tokens(name):
    """Its loss is made of the text alone, which it finds behind as many image tokens as there are."""
    whole, drop = MODELS[name], RandomPatchDropout(0.5)
    model, inputs = whole.build(), whole.inputs(2)
    attention = model.git.encoder.layer[0].attention.self
    all_tokens = attention.image_patch_tokens
    num_images = all_tokens // 37
    output = run(gaussmask.attach(model, drop), inputs)
    assert output.logits.shape[1] == 19 * num_images + 8
    text, following = output.logits[:, -8:-1], inputs["labels"][:, 1:]
    assert torch.allclose(output.loss, F.cross_entropy(text.flatten(0, 1), following.flatten()))
    assert attention.image_patch_tokens == 19 * num_images
    gaussmask.detach(model)
    assert attention.image_patch_tokens == all_tokens
    assert run(model, inputs).logits.shape[1] == all_tokens + 8


# By model: its pixels, their mask, and the axis that the mask lacks.
PADDED = {
    "Pix2StructForConditionalGeneration": ("flattened_patches", "attention_mask", -1),
    "Idefics2ForConditionalGeneration": ("pixel_values", "pixel_attention_mask", 2),
    "Siglip2ForImageClassification": ("pixel_values", "pixel_attention_mask", -1),
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_stays_without_influence(name):
    """The masks of the attentions, and of the pool behind them, follow the kept patches: what lies in the padding does
    not matter, with all patches and with half of them. Padding is kept only where an image has fewer real patches.
    """
    whole, drop = MODELS[name], RandomPatchDropout(0.5)
    pixels, mask, axis = PADDED[name]
    model, inputs = whole.build(), whole.inputs(3)
    dirt = torch.randn(inputs[pixels].shape[-1])
    dirt[:2] = 0.0  # Pix2Struct's row and column
    soiled = {**inputs, pixels: inputs[pixels] + dirt * (inputs[mask] == 0).unsqueeze(axis)}
    assert not torch.equal(soiled[pixels], inputs[pixels])
    assert torch.equal(run(model, soiled).loss, run(model, inputs).loss)
    gaussmask.attach(model, drop)
    assert torch.equal(run(model, soiled).loss, run(model, inputs).loss)
    real = inputs[mask][..., ::8, ::8] if axis == 2 else inputs[mask] > 0
    real, kept = real.reshape(len(drop.keep_mask), -1), drop.keep_mask.flatten(1)
    assert torch.equal((real & kept).sum(dim=1), real.sum(dim=1).clamp(max=18))
    assert (kept & ~real).any()
