"""open_clip's own training program with GLIP (or FLIP) in place of its patch dropout: no fork, one line, `attach`.

    python examples/open_clip_glip.py --model ViT-B-32 --force-patch-dropout 0.5 --dataset-type webdataset \
        --train-data "shards/{0000..0099}.tar" --train-num-samples 1000000 --val-data shards/val.tar

What GLIP's authors did with CC12M on four GPUs: 30 epochs on half of the patches, then one on all of them.

    torchrun --nproc_per_node 4 examples/open_clip_glip.py --model ViT-B-16 --force-patch-dropout 0.5 --sigma 0.2 \
        --train-data "cc12m/cc12m-train-{0000..2175}.tar" --train-num-samples 10968539 --dataset-type webdataset \
        --batch-size 320 --lr 1e-3 --epochs 30 --aug-cfg scale="(0.5,1)" --name glip
    torchrun --nproc_per_node 4 examples/open_clip_glip.py --model ViT-B-16 --force-patch-dropout 0 \
        --train-data "cc12m/cc12m-train-{0000..2175}.tar" --train-num-samples 10968539 --dataset-type webdataset \
        --batch-size 160 --lr 1e-5 --epochs 1 --aug-cfg scale="(0.5,1)" --name glip-tuned \
        --pretrained logs/glip/checkpoints/epoch_30.pt

All flags are open_clip_train's but for the five of `main`; `--force-patch-dropout` is the share of patches to drop.
(torchrun takes `--logs` for its own unless a `--` stands before the program.) Evaluation sees all patches, and plain
open_clip loads the checkpoints. With `--accum-freq` above 1 open_clip forwards each batch twice, and either time draws
other masks, as with its own patch dropout: the features in the loss are not quite those that are trained. train_clip.py
draws once.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlparse

import open_clip
import torch
from open_clip_train import data, params
from open_clip_train import main as program

import gaussmask


def main(argv: list[str]) -> Any:
    """Run open_clip's program with a drop of ours in the model; returns what it returns."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # --model is no short --model-config
    parser.add_argument("--patch-dropout-method", choices=["glip", "flip"], default="glip", help="default: glip")
    parser.add_argument("--sigma", type=float, default=0.2, help="of glip: variance of the Gaussian; default: 0.2")
    parser.add_argument("--sampling", default="additive", help="of glip: additive (default, the authors') or weighted")
    parser.add_argument("--stage", default="auto", help="tokens, or pixels: drop before the embedding (default: auto)")
    parser.add_argument("--model-config", metavar="DIR/NAME.json", help="a model of your own, for --model NAME")
    ours, theirs = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(theirs):
        print(parser.format_help())
    args = argparse.Namespace(**vars(params.parse_args(theirs)), **vars(ours))
    mend_program()
    with one_line_errors():
        if args.model_config:
            open_clip.add_model_config(args.model_config)
        check(args)
        drop: gaussmask.PatchDropout = gaussmask.RandomPatchDropout(args.force_patch_dropout or 0.0)
        if args.patch_dropout_method == "glip":
            drop = gaussmask.GaussianPatchDropout(drop.mask_ratio, args.sigma, sampling=args.sampling)

    create = program.create_model_and_transforms

    @one_line_errors()
    def create_with_drop(*names: Any, force_patch_dropout: float | None = None, **options: Any) -> Any:
        if force_patch_dropout is None:  # the teacher of a distillation, or nothing to train
            return create(*names, **options)
        model, *transforms = create(*names, force_patch_dropout=0.0, **options)
        return gaussmask.attach(model, drop, stage=args.stage), *transforms

    program.create_model_and_transforms = create_with_drop
    program.parse_args = lambda _: args  # with ours, so that they are in the log and in params.txt
    return program.main(theirs)


def check(args: argparse.Namespace) -> None:
    """Refuse what open_clip would answer with a traceback, or with a training on nothing."""
    if args.torchscript or args.trace:
        raise ValueError("--torchscript and --trace make models that cannot draw masks")
    if ":" not in args.model and args.model.replace("/", "-") not in open_clip.list_models():
        raise ValueError(f"unknown model {args.model!r}: open_clip.list_models() has the names")
    if args.train_data or args.dataset_type == "synthetic":
        if args.force_patch_dropout is None:
            raise ValueError("--force-patch-dropout is missing: the share of patches to drop, 0 for none")
    elif not (args.val_data or args.imagenet_val or args.imagenet_v2):
        raise ValueError("--train-data is missing")
    for source in filter(None, [args.train_data, args.val_data]):
        if data.get_dataset_fn(source, args.dataset_type) is data.get_wds_dataset:
            for shard in data.expand_urls(source)[0]:
                check_shard(shard)


def check_shard(url: str) -> None:
    """A local one must hold an image with a caption: open_clip passes over it, and may look for one for ever."""
    if urlparse(url).scheme:
        return
    if not os.path.isfile(url):
        raise FileNotFoundError(f"no such shard: {url}")
    if not any(map(data.filter_no_caption_or_no_image, data.tarfile_to_samples_nothrow([{"url": url}]))):
        raise ValueError(f"no image with a caption (KEY.jpg and KEY.txt) in {url}")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors before the training are about the arguments: one line instead of a traceback."""
    try:
        yield
    except (AssertionError, OSError, RuntimeError, ValueError, gaussmask.UnsupportedModelError) as error:
        sys.exit(f"open_clip_glip.py: {error}")


def mend_program() -> None:
    """What open_clip_train 3.3 lacks; none of it has to do with masks."""
    for name in ("get_data", "pt_load"):
        setattr(program, name, one_line_errors()(getattr(program, name)))

    # From version 0.2.96 on webdataset ends every shard with an empty dict (its issue 384).
    members = data.tar_file_expander
    data.tar_file_expander = lambda *args, **options: filter(None, members(*args, **options))

    # On CPUs DistributedDataParallel takes no device_ids.
    class DistributedDataParallel(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module: Any, device_ids: list[torch.device], **options: Any) -> None:
            super().__init__(module, None if device_ids[0].type == "cpu" else device_ids, **options)

    torch.nn.parallel.DistributedDataParallel = DistributedDataParallel  # type: ignore[assignment,misc]

    # An epoch without a batch is an epoch like any other to open_clip.
    train = program.train_one_epoch

    def train_one_epoch(model: Any, data: Any, loss: torch.nn.Module, *args: Any, **options: Any) -> None:
        losses: set[str] = set()
        hook = loss.register_forward_hook(lambda *_: losses.add("one"))
        train(model, data, loss, *args, **options)
        hook.remove()
        if not losses:
            sys.exit("open_clip_glip.py: nothing was trained: the data (of each worker) must fill a batch")

    program.train_one_epoch = train_one_epoch


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
