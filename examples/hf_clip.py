"""CLIP, FLIP or GLIP with transformers' `Trainer`: masked training, unmasked tuning, retrieval, `save_pretrained`.

    python examples/hf_clip.py --train train.tar.gz --test test.tar.gz --method glip --mask-ratio 0.5 \
        --num-train-epochs 10 --tuning-epochs 1 --per-device-train-batch-size 128 --output-dir build/hf_clip

With one process per GPU, or several on the CPU where there is no GPU (or with `--use-cpu`):

    torchrun --nproc_per_node 2 examples/hf_clip.py --train ... --test ...
    accelerate launch --multi_gpu --num_processes 2 examples/hf_clip.py --train ... --test ...

Without `--model` it trains a small CLIPModel from scratch; `--model FOLDER_OR_HUB_NAME` goes on from a CLIPModel or a
VisionTextDualEncoderModel. Every option of transformers.TrainingArguments is taken too (`--learning-rate`, `--bf16`,
`--report-to tensorboard`, `--resume-from-checkpoint FOLDER`, ...). What it leaves opens without gaussmask:

    transformers.CLIPModel.from_pretrained("build/hf_clip"), transformers.CLIPProcessor.from_pretrained("build/hf_clip")

Every process has the captions of all processes as negatives, as in one batch on one device; with `Trainer` alone each
would have its own only. `--gradient-accumulation-steps` averages the losses of separate batches and gives no image more
negatives (train_clip.py can do that). It runs under DDP; FSDP and DeepSpeed are refused. Every process reads all images
into memory: this is for sets up to a few hundred thousand small images.
"""

import argparse
import functools
import logging
import math
import os
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from clip_data import CaptionedImages, load
from clip_evaluation import Encoder, retrieval, to_floats, zero_shot
from clip_step import MAX_LOGIT_SCALE, make_drop, unwrap
from open_clip.loss import ClipLoss
from open_clip.tokenizer import SimpleTokenizer
from PIL.Image import Resampling
from torch import Tensor, nn
from torch.nn import functional as F
from user_errors import UserError, one_line, setting_up

import gaussmask

# Of transformers.TrainingArguments, where its own default does not suit this training.
DEFAULTS = {
    "output_dir": "build/hf_clip",
    "num_train_epochs": 10,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 256,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",  # one for the whole run: the tuning is its tail, at a few percent of the peak
    "warmup_steps": 0.1,  # below 1, a share of all steps
    "weight_decay": 0.1,
    "adam_beta2": 0.98,
    "logging_steps": 10,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "dataloader_drop_last": True,  # equally many negatives in every step
    "dataloader_pin_memory": torch.cuda.is_available(),
    "remove_unused_columns": False,
    "use_cpu": not torch.accelerator.is_available(),  # else torchrun's processes don't find each other on a CPU
    "ddp_find_unused_parameters": False,
}


@dataclass(frozen=True)
class Config:
    """Train a CLIP model on image-text pairs. All options of transformers.TrainingArguments are taken as well.

    Args:
        train: image-text pairs: WebDataset shards (path, URL, braces), an image folder, or torchvision:NAME.
        test: likewise, to evaluate on after every epoch: retrieval, and zero-shot top-1 where there are classes.
        method: glip (drops patches far from the centre first), flip (at random) or clip (none).
        mask_ratio: share of the patches that are dropped.
        sigma: variance of GLIP's Gaussian, see gaussmask.GaussianPatchDropout.
        sampling: of GLIP, additive (the authors' own) or weighted.
        stage: tokens or pixels: drop after or before the patch embedding; auto for pixels where they give the same.
        tuning_epochs: so many of the epochs, the last ones, are unmasked tuning.
        model: folder or hub name of a model to go on from; without it, a small one is made as follows.
        from_scratch: take the shape, the tokenizer and the image size of `model`, but not its weights.
        image_size: of the small model, in pixels.
        patch_size: likewise.
        width: of both transformers.
        depth: of the image transformer.
        text_depth: of the text transformer.
        embed_dim: of the space that both share.
        context_length: most tokens of a caption.
        limit: read at most so many images of each split.
    """

    train: str
    test: str
    method: str = "glip"
    mask_ratio: float = 0.5
    sigma: float = 0.2
    sampling: str = "additive"
    stage: str = "auto"
    tuning_epochs: float = 1
    model: str | None = None
    from_scratch: bool = False
    image_size: int = 64
    patch_size: int = 8
    width: int = 192
    depth: int = 6
    text_depth: int = 4
    embed_dim: int = 128
    context_length: int = 32
    limit: int | None = None


class UnmaskedTuning(transformers.TrainerCallback):
    """No mask in the last epochs (FLIP, section 3). The step alone decides, so that a resumed run does the same."""

    def __init__(self, drop: gaussmask.PatchDropout, epochs: float) -> None:
        self.drop = drop
        self.epochs = epochs
        self.mask_ratio = drop.mask_ratio

    def on_step_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **others: Any) -> None:
        steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        tuning = state.max_steps - state.global_step <= self.epochs * steps_per_epoch
        self.drop.mask_ratio = 0.0 if tuning else self.mask_ratio


class ClampedLogitScale(transformers.TrainerCallback):
    """Keeps the logit scale where CLIP keeps it."""

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


class CLIPTrainer(transformers.Trainer):
    """`Trainer` with the captions of all processes as negatives, and retrieval as its evaluation."""

    loss_is_scaled_for_ga = False  # the loss is the mean of one batch; gradient accumulation has to divide it

    def __init__(self, encoder: Encoder, **options: Any) -> None:
        super().__init__(**options)
        self.encoder = encoder
        self.contrastive_loss = ClipLoss(
            local_loss=True, gather_with_grad=True, rank=self.args.process_index, world_size=self.args.world_size
        )

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Each process compares its rows with everyone's; the mean that DDP takes is then that of the whole batch."""
        outputs = model(**inputs)
        scale = unwrap(model).logit_scale.exp()
        loss = self.contrastive_loss(outputs.image_embeds, outputs.text_embeds, scale)
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        found = retrieval(self.encoder, data)
        if data.labels is not None and data.classnames:
            found |= zero_shot(self.encoder, data)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Without vectors and scalars, such as the logit scale."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]


@dataclass(frozen=True)
class Pairs(torch.utils.data.Dataset[Any]):
    """Images, each with any one of its captions, as the models of transformers take them: a whole batch at once."""

    data: CaptionedImages
    tokenize: Callable[[list[str]], Any]
    mean: Sequence[float]
    std: Sequence[float]

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        several = self.data.all_captions
        captions = [random.choice(several[index]) if several else self.data.captions[index] for index in indices]
        pixels = to_floats(self.data.images[indices], "cpu", self.mean, self.std)
        return {"pixel_values": pixels, **self.tokenize(captions)}


class Towers(nn.Module):
    """A model of transformers with the interface of open_clip's, which the evaluation wants."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def encode_image(self, pixels: Tensor, normalize: bool = False) -> Tensor:
        features: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Any, normalize: bool = False) -> Tensor:
        features: Tensor = self.model.get_text_features(**tokens).pooler_output
        return F.normalize(features, dim=-1) if normalize else features


def small_model(config: Config) -> tuple[Any, Any]:
    """A CLIPModel with random weights; its processor has CLIP's own vocabulary, which open_clip ships."""
    bpe = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in bpe.encoder.items()}
    tokenizer = transformers.CLIPTokenizer(vocabulary, [*bpe.bpe_ranks], model_max_length=config.context_length)
    both = {
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_attention_heads": max(1, config.width // 64),
    }
    vision = {"num_hidden_layers": config.depth, "image_size": config.image_size, "patch_size": config.patch_size}
    text = {
        "num_hidden_layers": config.text_depth,
        "max_position_embeddings": config.context_length,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,  # at its first place the features of the text are taken
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape = transformers.CLIPConfig(
        vision_config=both | vision, text_config=both | text, projection_dim=config.embed_dim
    )
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": config.image_size},
        crop_size={"height": config.image_size, "width": config.image_size},
        resample=Resampling.BILINEAR,  # as clip_data.py
    )
    return transformers.CLIPModel(shape), transformers.CLIPProcessor(images, tokenizer)


def load_model(config: Config) -> tuple[Any, Any]:
    """The model, and the processor that goes with it."""
    if config.model is None:
        return small_model(config)
    try:
        shape = transformers.AutoConfig.from_pretrained(config.model)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot open the model {config.model!r}: {error}") from error
    if shape.model_type not in ("clip", "vision-text-dual-encoder"):
        raise UserError(f"{config.model} must be a clip or vision-text-dual-encoder model, got {shape.model_type}")
    processor = transformers.AutoProcessor.from_pretrained(config.model)
    if config.from_scratch:
        return transformers.AutoModel.from_config(shape), processor
    return transformers.AutoModel.from_pretrained(config.model, dtype=torch.float32), processor


def make_trainer(config: Config, args: transformers.TrainingArguments) -> CLIPTrainer:
    """Everything up to the first step."""
    if args.n_gpu > 1:
        raise UserError(f"start one process per GPU: torchrun --nproc_per_node {args.n_gpu} examples/hf_clip.py ...")
    if args.world_size != int(os.environ.get("WORLD_SIZE", 1)):
        raise UserError("the processes would train alone: Accelerate has no way to join them on this device")
    if args.resume_from_checkpoint and not Path(args.resume_from_checkpoint).is_dir():
        raise UserError(f"there is no checkpoint {args.resume_from_checkpoint}")
    transformers.set_seed(args.seed)
    drop = make_drop(config.method, config.mask_ratio, sigma=config.sigma, sampling=config.sampling)
    model, processor = load_model(config)
    callbacks: list[transformers.TrainerCallback] = [ClampedLogitScale()]
    if drop is not None:
        gaussmask.attach(model, drop, stage=config.stage)
        callbacks.append(UnmaskedTuning(drop, config.tuning_epochs))

    side = model.config.vision_config.image_size
    train = load(config.train, image_size=side, train=True, limit=config.limit)
    test = load(config.test, image_size=side, train=False, limit=config.limit)
    batch_size = args.train_batch_size * args.world_size
    if len(train) < batch_size:
        raise UserError(f"{config.train} holds {len(train)} images, and a batch of all processes takes {batch_size}")
    length = min(processor.tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    tokenize = functools.partial(
        processor.tokenizer, padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    precision = "bf16" if args.bf16 else "fp32"
    encoder = Encoder(Towers(model), tokenize, str(args.device), precision, mean, std, args.per_device_eval_batch_size)
    trainer = CLIPTrainer(
        encoder,
        model=model,
        args=args,
        train_dataset=Pairs(train, tokenize, mean, std),
        eval_dataset=test,
        data_collator=torch.utils.data.default_convert,  # the data come in batches
        processing_class=processor,
        callbacks=callbacks,
    )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError("FSDP and DeepSpeed are not supported: start it with torchrun or accelerate's MULTI_GPU")
    transformers.set_seed(args.seed + args.process_index)  # masks and captions of its own for every process
    return trainer


def parse(argv: Sequence[str]) -> tuple[Config, transformers.TrainingArguments]:
    """Our own options, and transformers' from what is left."""
    config, rest = tyro.cli(Config, args=argv, return_unknown_args=True)
    parser = transformers.HfArgumentParser(
        transformers.TrainingArguments,  # type: ignore[arg-type]  # which is a dataclass
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.set_defaults(**DEFAULTS)
    try:
        (args,) = parser.parse_args_into_dataclasses(rest, look_for_args_file=False)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    args.data_seed = args.seed if args.data_seed is None else args.data_seed  # one order of the data for all processes
    return config, args


def main(argv: Sequence[str]) -> None:
    """Train, evaluate after every epoch, and leave the model in `--output-dir`."""
    transformers.utils.logging.disable_progress_bar()  # of files being read and written; that of the training stays
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # without a line for every retry
    # The loss of open_clip gathers by a function that newer versions of torch want to replace.
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather", FutureWarning)
    with one_line("hf_clip.py"):
        with setting_up():
            trainer = make_trainer(*parse(argv))
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
