"""CLIP pre-training at scale on fewer patches: one loop for a laptop, a GPU, or many nodes.

On one CPU or GPU:

    python examples/train_clip.py --train-data "cc12m/{00000..01242}.tar" --method glip --mask-ratio 0.75

On all GPUs of one node, and on two nodes of eight:

    torchrun --standalone --nproc_per_node 8 examples/train_clip.py --train-data ... --method glip
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_endpoint HOST:29500 --rdzv_backend c10d examples/train_clip.py ...
    accelerate launch --num_processes 8 examples/train_clip.py --train-data ... --method glip

After a crash, the same command with `--resume` goes on from the last checkpoint as if nothing had happened. Unmasked
tuning of a model that is there already:

    python examples/train_clip.py --train-data ... --init-from build/clip/training/model --epochs 0 --tuning-epochs 1

What happens to the data: shards -> images, tokens -> towers (the drop sits in the image tower) -> gathered features ->
contrastive loss -> AdamW. It leaves in `--output`: `metrics.jsonl` (every logged number), `config.json`, and for each
phase (training, tuning) `checkpoints/` and `model/`, which opens in plain open_clip, timm or transformers.
"""

import datetime
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
import torch.distributed as dist
import tyro
from clip_checkpoints import (
    Ranks,
    latest_checkpoint,
    load_checkpoint,
    read_info,
    save_checkpoint,
    whole_parameter,
    whole_state_dict,
)
from clip_data import load
from clip_evaluation import Encoder, evaluate, load_evaluation
from clip_metrics import MetricsLog, peak_memory
from clip_shards import count_samples, expand, is_local
from clip_step import (
    autocast,
    learning_rate,
    make_drop,
    make_optimizer,
    set_learning_rate,
    train_step_in_parts,
)
from clip_stream import CaptionStream, Memory, Progress, Shards, Source
from clip_towers import create_model, make_tokenizer, model_config, save_model
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from user_errors import UserError, one_line, setting_up

import gaussmask

Method = Literal["clip", "flip", "glip", "reclip", "reclip+flip", "reclip+glip"]


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on.

    Args:
        train_data: shards (path, URL, `pipe:`, braces, `*`, several joined by `::`), or with `in_memory` also an image
            folder or torchvision:NAME.
        in_memory: read all training images into memory first, at the model's image size.
        samples_per_epoch: how many samples count as one epoch; counted in local shards if not given.
        captions: the first caption of an image, or each time a random one of all (`"captions"` in KEY.json).
        shuffle: samples in each reader's shuffle buffer.
        resampled: draw shards with replacement instead of going through all of them.
        crop_scale: share of the image's area that random crops take, at least and at most.
        workers: readers of each process.
        model: a name of open_clip, or a .json file or folder in its format.
        image_tower: timm:NAME or transformers:NAME instead of the model's own image tower.
        image_size: instead of the model's own.
        context_length: of the captions, in tokens, instead of the model's own.
        init_from: weights to start from: a `model/` folder of a run, or a file.
        method: clip (no mask), flip (random), glip (centred), reclip (smaller images), or reclip with a mask.
        mask_ratio: share of the patches that flip and glip drop.
        sigma: of glip: the variance of the Gaussian on the square [-1, 1]^2.
        sampling: of glip: additive (the authors' rule) or weighted (every patch has a chance).
        stage: where patches are dropped: after the projection (tokens), before (pixels), or before where that gives the
            same tokens (auto).
        small_image_size: of reclip; half of the model's image size if not given.
        loss: softmax over the batch (clip) or sigmoid of each pair (siglip).
        epochs: of the masked training; a fraction is part of an epoch.
        tuning_epochs: without a mask and on full-sized images, afterwards.
        batch_size: of the contrastive loss, over all processes.
        accumulate: forwards that the batch of a process is split into. The loss still compares all of it.
        tuning_batch_size: likewise in the tuning; that of training if not given.
        tuning_accumulate: likewise in the tuning, where nothing is masked; that of training if not given.
        lr: the peak; a linear warm-up comes before and a cosine to 0 after.
        tuning_lr: the peak of the tuning.
        warmup: share of the steps.
        weight_decay: of AdamW, on matrices.
        betas: of AdamW.
        eps: of AdamW.
        max_norm: gradients of a larger norm are scaled down to it.
        precision: bf16 (autocast), fp32, or auto for the faster of the two.
        compile: torch.compile.
        grad_checkpointing: recompute activations in the backward, for memory.
        device: cuda or cpu.
        fsdp: shard weights, gradients and moments over the processes (FSDP2) instead of replicating them (DDP).
        zero_shot: labelled test images, for zero-shot top-1 and top-5.
        probe: labelled training images for a linear probe, which is tested on `zero_shot`.
        retrieval: images with captions, for recall at 1, 5 and 10.
        eval_every: epochs between evaluations; there is always one at the end of a phase.
        eval_batch_size: of a process.
        log_every: steps between lines of the log.
        checkpoint_every: steps between checkpoints.
        keep: so many of the latest checkpoints are kept.
        tensorboard: also write TensorBoard's event files.
        seed: of weights, order of the data and (together with the rank) masks.
        output: folder for everything that the run leaves, seen by all nodes.
        resume: go on from the last checkpoint in `output`, or begin if there is none.
    """

    train_data: str
    in_memory: bool = False
    samples_per_epoch: int | None = None
    captions: Literal["first", "random"] = "first"
    shuffle: int = 5000
    resampled: bool = False
    crop_scale: tuple[float, float] = (0.9, 1.0)
    workers: int = 4

    model: str = "ViT-B-16"
    image_tower: str | None = None
    image_size: int | None = None
    context_length: int | None = None
    init_from: Path | None = None

    method: Method = "glip"
    mask_ratio: float = 0.5
    sigma: float = 0.2
    sampling: Literal["additive", "weighted"] = "additive"
    stage: Literal["auto", "tokens", "pixels"] = "auto"
    small_image_size: int | None = None
    loss: Literal["clip", "siglip"] = "clip"

    epochs: float = 30
    tuning_epochs: float = 1
    batch_size: int = 1280
    accumulate: int = 1
    tuning_batch_size: int | None = None
    tuning_accumulate: int | None = None
    lr: float = 1e-3
    tuning_lr: float = 1e-5
    warmup: float = 0.05
    weight_decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    max_norm: float = math.inf

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    grad_checkpointing: bool = False
    fsdp: bool = False
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")

    zero_shot: str | None = None
    probe: str | None = None
    retrieval: str | None = None
    eval_every: float = 1
    eval_batch_size: int = 500

    log_every: int = 50
    checkpoint_every: int = 1000
    keep: int = 3
    tensorboard: bool = False
    seed: int = 0
    output: Path = Path("build/clip")
    resume: bool = False


@dataclass(frozen=True)
class Phase:
    """Training with masks, or tuning without."""

    name: str
    epochs: float
    batch_size: int
    accumulate: int
    lr: float
    image_size: int
    drop: gaussmask.PatchDropout | None
    weights: Path | None
    seed: int


def main(config: Config) -> None:
    """Train, then tune."""
    # open_clip's loss gathers by a function that newer versions of torch want to replace.
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather", FutureWarning)
    with setting_up():
        ranks = start_processes(config)
        phases = plan(config, ranks)
        prepare_output(config, ranks)
    for phase in phases:
        if (config.output / phase.name / "model").is_dir():
            if ranks.first:
                print(f"{phase.name} is finished already")
        else:
            run(phase, config, ranks)
    if dist.is_initialized():
        dist.destroy_process_group()


def start_processes(config: Config) -> Ranks:
    """Join the other processes, if torchrun or accelerate started any."""
    torch.set_float32_matmul_precision("high")
    if "RANK" not in os.environ:
        return Ranks()
    ranks = Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if config.device == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    # The others wait while the first process fits a linear probe or writes a model.
    dist.init_process_group("nccl" if config.device == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
    return ranks


def plan(config: Config, ranks: Ranks) -> list[Phase]:
    """The phases of the run; raises for settings that can't be meant."""
    size = configure_model(config)["vision_cfg"].get("image_size", 224)
    mask = config.method.removeprefix("reclip").removeprefix("+") or "clip"
    drop = make_drop(mask, config.mask_ratio, sigma=config.sigma, sampling=config.sampling)
    training = Phase(
        name="training",
        epochs=config.epochs,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        lr=config.lr,
        image_size=(config.small_image_size or size // 2) if config.method.startswith("reclip") else size,
        drop=drop,
        weights=config.init_from,
        seed=config.seed,
    )
    tuning = Phase(
        name="tuning",
        epochs=config.tuning_epochs,
        batch_size=config.tuning_batch_size or config.batch_size,
        accumulate=config.tuning_accumulate or config.accumulate,
        lr=config.tuning_lr,
        image_size=size,
        drop=None,
        weights=config.output / "training" / "model" if config.epochs > 0 else config.init_from,
        seed=config.seed + 1_000_000,
    )
    phases = [phase for phase in (training, tuning) if phase.epochs > 0]
    if not phases:
        raise UserError("epochs and tuning_epochs are both 0: there is nothing to do")
    for phase in phases:
        if phase.batch_size < 1 or phase.accumulate < 1 or phase.batch_size % (ranks.world_size * phase.accumulate):
            raise UserError(
                f"batch_size of {phase.name} must be a multiple of processes x accumulate = {ranks.world_size} x "
                f"{phase.accumulate}, got {phase.batch_size}"
            )
    for name in ("log_every", "checkpoint_every", "keep", "eval_every"):
        if getattr(config, name) <= 0:
            raise UserError(f"{name} must be positive, got {getattr(config, name)}")
    if config.method.startswith("reclip") and (config.image_tower or "").startswith("transformers:"):
        raise UserError("reclip needs an image tower of open_clip or timm: those of transformers keep their image size")
    if config.probe and not config.zero_shot:
        raise UserError("probe needs zero_shot: the probe is tested on its images")
    if config.compile and config.device == "cpu" and torch.__version__ < "2.7":
        raise UserError(
            f"compile on the CPU needs torch 2.7, got {torch.__version__}: where a token is repeated, torch 2.6 loses "
            "gradients of its embedding there"
        )
    return phases


def configure_model(config: Config, image_size: int | None = None) -> dict[str, Any]:
    """open_clip's configuration of the model, for images of `image_size`."""
    architecture = model_config(
        config.model,
        image_tower=config.image_tower,
        image_size=image_size or config.image_size,
        siglip=config.loss == "siglip",
    )
    if config.context_length is not None:
        architecture["text_cfg"]["context_length"] = config.context_length
    if config.fsdp:
        architecture["nonscalar_logit_scale"] = True  # FSDP2 shards no scalars
    return architecture


def prepare_output(config: Config, ranks: Ranks) -> None:
    """The folder of the run, which must be new or asked to be resumed."""
    if ranks.first:
        begun = config.output / "config.json"
        if begun.exists() and not config.resume:
            raise UserError(f"{config.output} holds a run already: take another --output, or --resume to go on with it")
        config.output.mkdir(parents=True, exist_ok=True)
        setting = json.loads(json.dumps(asdict(config), default=str))
        if begun.exists():
            before = json.loads(begun.read_text(encoding="utf-8"))
            for name in ("model", "image_tower", "method", "loss"):
                if before[name] != setting[name]:
                    raise UserError(
                        f"{config.output} holds a run with {name} {before[name]}, this one has {setting[name]}: take "
                        "another --output"
                    )
            changed = [
                f"{name} {before.get(name)} -> {value}"
                for name, value in setting.items()
                if value != before.get(name) and name != "resume"
            ]
            if changed:
                print(f"changed since the run began: {', '.join(changed)}")
        begun.write_text(json.dumps(setting, indent=1) + "\n", encoding="utf-8")


def run(phase: Phase, config: Config, ranks: Ranks) -> None:
    """Everything of one phase: model, data, loop, evaluation, checkpoints, and the finished model."""
    device = torch.device(config.device)
    folder = config.output / phase.name
    with setting_up():
        torch.manual_seed(config.seed)  # the same weights on every process
        architecture = configure_model(config, phase.image_size)
        clip = create_model(architecture, phase.weights).to(device)
        preprocessing = open_clip.transform.PreprocessCfg(**clip.visual.preprocess_cfg)
        tokenize = make_tokenizer(architecture)
        if phase.drop is not None:
            gaussmask.attach(clip, phase.drop, stage=config.stage)  # before compiling and wrapping
        model = prepare_model(clip, config, ranks)
        optimizer = make_optimizer(
            model.parameters(), lr=phase.lr, weight_decay=config.weight_decay, betas=config.betas, eps=config.eps
        )
        source, samples_per_epoch = open_data(config, phase, ranks)
        steps_per_epoch = samples_per_epoch / phase.batch_size
        num_steps = max(1, round(phase.epochs * steps_per_epoch))

        torch.manual_seed(phase.seed + ranks.rank)  # other masks on every process
        first_step, progress = resume(config, phase, model, optimizer, ranks, steps_per_epoch)
        stream = CaptionStream(
            source,
            open_clip.transform.image_transform_v2(preprocessing, is_train=True, aug_cfg={"scale": config.crop_scale}),
            tokenize,
            batch_size=phase.batch_size // ranks.world_size,
            seed=phase.seed,
            random_captions=config.captions == "random",
            rank=ranks.rank,
            world_size=ranks.world_size,
            progress=progress,
        )
        loader = torch.utils.data.DataLoader(
            stream,
            batch_size=None,
            num_workers=config.workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # of its own, so that it draws nothing from the masks' one
        )
        encoder = Encoder(
            clip, tokenize, config.device, config.precision, preprocessing.mean, preprocessing.std,
            config.eval_batch_size, config.seed,
        )  # fmt: skip
        evaluation = load_evaluation(
            phase.image_size, zero_shot=config.zero_shot, probe=config.probe, retrieval=config.retrieval
        )

    contrastive_loss = make_loss(config, ranks)
    log = MetricsLog(config.output, phase.name, first_step, tensorboard=config.tensorboard, silent=not ranks.first)
    eval_steps = max(1.0, config.eval_every * steps_per_epoch)
    losses: list[torch.Tensor] = []
    started = time.perf_counter()
    model.train()
    bar = tqdm(total=num_steps, initial=first_step, desc=phase.name, unit=" steps", disable=not ranks.first)
    for step, batch in zip(range(first_step + 1, num_steps + 1), loader, strict=False):
        lr = learning_rate(step - 1, num_steps=num_steps, num_warmup=round(config.warmup * num_steps), peak=phase.lr)
        set_learning_rate(optimizer, lr)
        images = batch.images.to(device, non_blocking=True).chunk(phase.accumulate)
        tokens = batch.tokens.to(device, non_blocking=True).chunk(phase.accumulate)
        loss = train_step_in_parts(
            model, images, tokens, contrastive_loss, optimizer, autocast(config.precision, config.device),
            max_norm=config.max_norm,
        )  # fmt: skip
        losses.append(loss)
        progress.take(batch)
        for problem in batch.skipped:
            tqdm.write(f"skipped {problem}", file=sys.stderr)
        bar.update()

        if step % config.log_every == 0 or step == num_steps:
            mean = summed(float(torch.stack(losses).mean()), ranks, device) / ranks.world_size
            if not math.isfinite(mean):
                last = latest_checkpoint(folder / "checkpoints")
                raise UserError(f"the loss is {mean} at step {step}: lower lr or set max_norm; last checkpoint: {last}")
            seconds = time.perf_counter() - started
            log.write(
                step,
                samples=step * phase.batch_size,
                loss=mean,
                lr=lr,
                logit_scale=float(whole_parameter(clip.logit_scale).exp()),
                images_per_second=len(losses) * phase.batch_size / seconds,
                patches=patches_per_image(phase.drop),
                memory_gib=peak_memory(device),
                skipped=round(summed(progress.skipped, ranks, device)),
            )
            losses, started = [], time.perf_counter()
        paused = time.perf_counter()
        if evaluation and (step == num_steps or step // eval_steps > (step - 1) // eval_steps):
            log.write(step, **evaluate(encoder, evaluation, masked=phase.drop is not None))
        if step % config.checkpoint_every == 0 and step < num_steps:
            info = {"phase": phase.name, "readers": readers(config)}
            save_checkpoint(folder / "checkpoints", step, model, optimizer, progress, info, ranks, keep=config.keep)
        started += time.perf_counter() - paused  # neither counts for the speed
    bar.close()
    finish(folder / "model", architecture, model, ranks)


def prepare_model(model: Any, config: Config, ranks: Ranks) -> nn.Module:
    """Checkpointing, compiling, and the wrapper that reduces gradients over the processes."""
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    if config.compile:
        # Draw what eager mode draws, with and without gradients: both forwards of a split batch need the same masks.
        torch._inductor.config.fallback_random = True
    if config.fsdp:
        if not dist.is_initialized():
            raise UserError("fsdp needs processes to shard over: start the program with torchrun")
        for block in blocks(model):
            if config.compile:
                block.compile()
            fully_shard(block)
        fully_shard(model)
        for method in ("encode_image", "encode_text"):
            register_fsdp_forward_method(model, method)
        return model
    if config.compile:
        model.compile()
    if ranks.world_size > 1:
        return DistributedDataParallel(model, device_ids=[ranks.local_rank] if config.device == "cuda" else None)
    return model


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules: a transformer's blocks."""
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from (member for member in child if any(True for _ in member.parameters()))
        else:
            yield from blocks(child)


def make_loss(config: Config, ranks: Ranks) -> nn.Module:
    """open_clip's loss over the batches of all processes; each computes its own rows and gets gradients for them."""
    if config.loss == "siglip":
        return open_clip.loss.SigLipLoss(rank=ranks.rank, world_size=ranks.world_size)
    return open_clip.loss.ClipLoss(local_loss=True, gather_with_grad=True, rank=ranks.rank, world_size=ranks.world_size)


def open_data(config: Config, phase: Phase, ranks: Ranks) -> tuple[Source, int]:
    """The training data, and how many samples of it are an epoch."""
    if config.in_memory:
        data = load(config.train_data, image_size=phase.image_size, train=True)
        return Memory(data, phase.seed), config.samples_per_epoch or len(data)
    shards = expand(config.train_data)
    samples = config.samples_per_epoch
    if samples is None:
        if not all(is_local(shard) for shard in shards):
            raise UserError("samples_per_epoch must be given for shards that are not local files")
        counted = [count_samples(shards) if ranks.first else 0]
        if ranks.world_size > 1:
            dist.broadcast_object_list(counted)
        samples = counted[0]
    if samples <= 0:
        raise UserError(f"train_data {config.train_data} holds no images")
    return Shards(shards, phase.seed, config.shuffle, config.resampled), samples


def readers(config: Config) -> int:
    """Who reads data in a process: its workers, or itself."""
    return max(1, config.workers)


def resume(
    config: Config,
    phase: Phase,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    steps_per_epoch: float,
) -> tuple[int, Progress]:
    """The step and the place in the data to go on from, with everything else put back."""
    checkpoint = latest_checkpoint(config.output / phase.name / "checkpoints") if config.resume else None
    if checkpoint is None:
        return 0, Progress()
    info = read_info(checkpoint)
    same_layout = info["world_size"] == ranks.world_size and info["readers"] == readers(config)
    progress = load_checkpoint(checkpoint, model, optimizer, ranks, own_state=same_layout)
    message = f"going on from {checkpoint}"
    if progress is None:
        epoch = int(info["step"] / steps_per_epoch)
        progress = Progress(positions=dict.fromkeys(range(readers(config)), (epoch, 0)))
        message += f"; with other numbers of processes or workers, from the start of epoch {epoch} of the data"
    if ranks.first:
        print(message)
    return info["step"], progress


def finish(folder: Path, architecture: dict[str, Any], model: nn.Module, ranks: Ranks) -> None:
    """Leave the finished model, whole or not at all."""
    weights = whole_state_dict(model)
    if ranks.first:
        part = folder.with_name(".model.part")
        with setting_up():
            shutil.rmtree(part, ignore_errors=True)
            save_model(part, architecture, weights)
            part.rename(folder)
        print(f"left the model in {folder}")
    if ranks.world_size > 1:
        dist.barrier()


def patches_per_image(drop: gaussmask.PatchDropout | None) -> str:
    """Kept and all patches of the latest forward."""
    if drop is None or drop.keep_indices is None or drop.keep_mask is None:
        return "all"
    return f"{drop.keep_indices.shape[1]}/{drop.keep_mask[0].numel()}"


def summed(value: float, ranks: Ranks, device: torch.device) -> float:
    """Over all processes."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    if ranks.world_size > 1:
        dist.all_reduce(tensor)
    return float(tensor)


if __name__ == "__main__":
    with one_line("train_clip.py"):
        main(tyro.cli(Config))
