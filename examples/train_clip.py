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
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as dist
from clip_captions import (
    Tokenize,
    count_words,
    count_words_in_shards,
    make_shortener,
    read_counts,
    write_counts,
)
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
from clip_evaluation import Encoder, evaluate, load_evaluation, to_floats
from clip_images import RandomCrop, decode_on
from clip_metrics import MetricsLog, peak_memory
from clip_options import Config, as_options, parse
from clip_plan import Phase, configure_model, plan, prepare_output, ratio_at
from clip_shards import count_samples, expand, is_local
from clip_step import autocast, learning_rate, make_optimizer, set_learning_rate, train_step_in_parts
from clip_stream import CaptionStream, Memory, Progress, Shards, open_loader
from clip_towers import create_model, make_tokenizer, save_model
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from user_errors import UserError, one_line, setting_up

import gaussmask


def main(config: Config) -> None:
    """Train, then tune."""
    # open_clip's loss gathers by a function that newer versions of torch want to replace.
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather", FutureWarning)
    with setting_up():
        ranks = start_processes(config)
        phases = plan(config, ranks)
        prepare_output(config, ranks)
    for phase in phases:
        if (config.run.output / phase.name / "model").is_dir():
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
    if config.compute.device == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    # The others wait while the first process fits a linear probe or writes a model.
    dist.init_process_group("nccl" if config.compute.device == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
    return ranks


def run(phase: Phase, config: Config, ranks: Ranks) -> None:
    """Everything of one phase: model, data, loop, evaluation, checkpoints, and the finished model."""
    data, recipe, compute, evaluated = config.data, config.recipe, config.compute, config.evaluation
    device = torch.device(compute.device)
    folder = config.run.output / phase.name
    with setting_up():
        torch.manual_seed(recipe.seed)  # the same weights on every process
        architecture = configure_model(config, phase.image_size)
        clip = create_model(architecture, phase.weights).to(device)
        preprocessing = open_clip.transform.PreprocessCfg(**clip.visual.preprocess_cfg)
        tokenize = make_tokenizer(architecture)
        if phase.drop is not None:
            gaussmask.attach(clip, phase.drop, stage=config.mask.stage)  # before compiling and wrapping
        model = prepare_model(clip, config, ranks)
        optimizer = make_optimizer(
            model.parameters(), lr=phase.lr, weight_decay=recipe.weight_decay, betas=recipe.betas, eps=recipe.eps
        )
        source, samples_per_epoch = open_data(config, phase, ranks)
        steps_per_epoch = samples_per_epoch / phase.batch_size
        num_steps = max(1, round(phase.epochs * steps_per_epoch))

        torch.manual_seed(phase.seed + ranks.rank)  # other masks on every process
        first_step, progress = resume(config, phase, model, optimizer, ranks, steps_per_epoch)
        stream = CaptionStream(
            source,
            RandomCrop(preprocessing.size, data.crop_scale, data.decode),
            caption_tokenizer(config, phase, architecture, source, ranks),
            batch_size=phase.batch_size // ranks.world_size,
            seed=phase.seed,
            random_captions=config.text.captions == "random",
            rank=ranks.rank,
            world_size=ranks.world_size,
            progress=progress,
        )
        loader = open_loader(stream, workers=data.workers, prefetch=data.prefetch, pin=device.type == "cuda")
        encoder = Encoder(
            clip, tokenize, compute.device, compute.precision, preprocessing.mean, preprocessing.std,
            evaluated.eval_batch_size, recipe.seed, data.workers,
        )  # fmt: skip
        evaluation = load_evaluation(
            phase.image_size, zero_shot=evaluated.zero_shot, probe=evaluated.probe, retrieval=evaluated.retrieval,
            imagenet=evaluated.imagenet, imagenet_templates=evaluated.imagenet_templates, preprocessing=preprocessing,
        )  # fmt: skip

    contrastive_loss = make_loss(config, ranks)
    log = open_log(config, phase, first_step, ranks)
    eval_steps = max(1.0, evaluated.eval_every * steps_per_epoch)
    losses: list[torch.Tensor] = []
    batches = iter(loader)
    started, waited = time.perf_counter(), 0.0
    model.train()
    if ranks.first:
        print(f"{phase.name}: steps {first_step + 1} to {num_steps}", flush=True)
    on_a_terminal = None if ranks.first else True  # in the file of a job the log is enough
    bar = tqdm(total=num_steps, initial=first_step, desc=phase.name, unit=" steps", disable=on_a_terminal)
    for step in range(first_step + 1, num_steps + 1):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        if phase.drop is not None and phase.mask_ratio_end is not None:
            phase.drop.mask_ratio = ratio_at((step - 1) / max(1, num_steps - 1), config.mask)
        lr = learning_rate(step - 1, num_steps=num_steps, num_warmup=round(recipe.warmup * num_steps), peak=phase.lr)
        set_learning_rate(optimizer, lr)
        undecoded: list[str] = []
        uint8 = decode_on(device, batch.images, undecoded.append)
        images = to_floats(uint8, compute.device, preprocessing.mean, preprocessing.std).chunk(phase.accumulate)
        tokens = batch.tokens.to(device, non_blocking=True).chunk(phase.accumulate)
        loss = train_step_in_parts(
            model, images, tokens, contrastive_loss, optimizer, autocast(compute.precision, compute.device),
            max_norm=recipe.max_norm,
        )  # fmt: skip
        losses.append(loss)
        progress.take(batch)
        progress.skipped += len(undecoded)
        for problem in [*batch.skipped, *undecoded]:
            tqdm.write(f"skipped {problem}", file=sys.stderr)
        bar.update()

        if step % config.run.log_every == 0 or step == num_steps:
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
                waited=waited / seconds,
                patches=patches_per_image(phase.drop),
                memory_gib=peak_memory(device),
                skipped=round(summed(progress.skipped, ranks, device)),
            )
            losses, started, waited = [], time.perf_counter(), 0.0
        paused = time.perf_counter()
        if evaluation and (step == num_steps or step // eval_steps > (step - 1) // eval_steps):
            log.write(step, **evaluate(encoder, evaluation, masked=phase.drop is not None))
        if step % config.run.checkpoint_every == 0 and step < num_steps:
            info = {"phase": phase.name, "readers": readers(config)}
            save_checkpoint(folder / "checkpoints", step, model, optimizer, progress, info, ranks, keep=config.run.keep)
        started += time.perf_counter() - paused  # neither counts for the speed
    bar.close()
    log.close()
    finish(folder / "model", architecture, model, ranks)


def open_log(config: Config, phase: Phase, step: int, ranks: Ranks) -> MetricsLog:
    """Of the first process; the others' writes nothing."""
    run = config.run
    boards = [name for name in ("tensorboard", "wandb", "trackio") if getattr(run, name)]
    options = as_options(config)
    return MetricsLog(
        run.output, phase.name, step, boards=boards, project=run.project, options=options, silent=not ranks.first
    )


def prepare_model(model: Any, config: Config, ranks: Ranks) -> nn.Module:
    """Checkpointing, compiling, and the wrapper that reduces gradients over the processes."""
    if config.compute.grad_checkpointing:
        model.set_grad_checkpointing()
    if config.compute.compile:
        # Draw what eager mode draws, with and without gradients: both forwards of a split batch need the same masks.
        torch._inductor.config.fallback_random = True
    if config.compute.fsdp:
        if not dist.is_initialized():
            raise UserError("fsdp needs processes to shard over: start the program with torchrun")
        for block in blocks(model):
            if config.compute.compile:
                block.compile()
            fully_shard(block)
        fully_shard(model)
        for method in ("encode_image", "encode_text"):
            register_fsdp_forward_method(model, method)
        return model
    if config.compute.compile:
        model.compile()
    if ranks.world_size > 1:
        on_gpu = config.compute.device == "cuda"
        return DistributedDataParallel(model, device_ids=[ranks.local_rank] if on_gpu else None)
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
    if config.recipe.loss == "siglip":
        return open_clip.loss.SigLipLoss(rank=ranks.rank, world_size=ranks.world_size)
    return open_clip.loss.ClipLoss(local_loss=True, gather_with_grad=True, rank=ranks.rank, world_size=ranks.world_size)


def open_data(config: Config, phase: Phase, ranks: Ranks) -> tuple[Shards | Memory, int]:
    """The training data, and how many samples of it are an epoch."""
    if config.data.in_memory:
        data = load(config.data.train_data, image_size=phase.image_size, train=True)
        return Memory(data, phase.seed), config.data.samples_per_epoch or len(data)
    shards = expand(config.data.train_data)
    samples = config.data.samples_per_epoch
    if samples is None:
        if not all(is_local(shard) for shard in shards):
            raise UserError("samples_per_epoch must be given for shards that are not local files")
        counted = [count_samples(shards) if ranks.first else 0]
        if ranks.world_size > 1:
            dist.broadcast_object_list(counted)
        samples = counted[0]
    if samples <= 0:
        raise UserError(f"train_data {config.data.train_data} holds no images")
    return Shards(shards, phase.seed, config.data.shuffle, config.data.resampled), samples


def caption_tokenizer(
    config: Config, phase: Phase, architecture: dict[str, Any], source: Shards | Memory, ranks: Ranks
) -> Tokenize:
    """What makes tokens of the captions in this phase: whole ones, or short ones."""
    text = config.text
    if phase.caption_tokens is None:
        whole: Tokenize = make_tokenizer(architecture)
        return whole
    counts = word_counts(config, source, ranks) if text.caption_reduction == "frequency" else {}
    return make_shortener(
        architecture, phase.caption_tokens, text.caption_reduction, counts=counts, threshold=text.caption_threshold
    )


def word_counts(config: Config, source: Shards | Memory, ranks: Ranks) -> dict[str, int]:
    """Of the captions of the training data: counted by the first process, once for a run and all that resume it."""
    if config.text.caption_counts is not None:
        return read_counts(config.text.caption_counts)
    file = config.run.output / "word_counts.json"
    if ranks.first and not file.exists():
        every = config.text.captions == "random"
        if isinstance(source, Memory):
            data = source.data
            captions = data.all_captions or [[caption] for caption in data.captions]
            counts = count_words(caption for texts in captions for caption in (texts if every else texts[:1]))
        else:
            counts = count_words_in_shards(source.shards, all_captions=every, workers=config.data.workers)
        write_counts(file, counts)
    if ranks.world_size > 1:
        dist.barrier()
    return read_counts(file)


def readers(config: Config) -> int:
    """Who reads data in a process: its workers, or itself."""
    return max(1, config.data.workers)


def resume(
    config: Config,
    phase: Phase,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    steps_per_epoch: float,
) -> tuple[int, Progress]:
    """The step and the place in the data to go on from, with everything else put back."""
    checkpoint = latest_checkpoint(config.run.output / phase.name / "checkpoints") if config.run.resume else None
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
        main(parse(sys.argv[1:], program="train_clip.py", description=str(__doc__)))
