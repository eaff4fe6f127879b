"""Write docs/hosts.md, the families that gaussmask masks and those that it refuses, from the tables of the tests.

    make hosts

Every tiny model of tests/hosts.py is put to the position oracle, and every name of the installed timm and every vision
model of the installed transformers is described (three minutes on 2 cores). tests/test_hosts_page.py holds the page
against the tables.
"""

import collections
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import timm
import torch
import transformers
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "hosts.md"
LIBRARIES = ("timm", "open_clip", "transformers")
sys.path.insert(0, str(ROOT / "tests"))

from hosts import ALL  # noqa: E402
from oracle import DROPS, ask  # noqa: E402
from test_every_name import build_on_meta, on_meta, vision_classes  # noqa: E402

import gaussmask  # noqa: E402
from gaussmask.hosts import HOSTS  # noqa: E402
from gaussmask.hosts.refusals import REFUSED, REFUSED_OWNERS  # noqa: E402


class Measured(NamedTuple):
    """What was measured about one family."""

    models: str
    error: str


TEXT = """# Hosts: which models gaussmask masks

`gaussmask.describe(model)` says of a model at hand what this page says of all families.

This page is written by `make hosts` from the tables that the tests walk. Measured with {versions}.

## Masked

*Always kept*: tokens in front of the patches, and behind them. *Pixels*: whether `attach(model, drop, stage="pixels")`
can drop before the projection, as the family's tiny model is built. *Notes*: what lies beside the tokens with one row
for each, and loses the rows of the dropped patches too; and what to mind. A mean over tokens is a mean over the kept
ones.

{masked}

## The proof

Every family is proven by the position oracle.

{proofs}

**The position oracle.** A model in training mode with all other dropouts at 0 keeps some patches, drawn apart for
every image and in no order, with all position tables and biases random. The hidden states of the kept tokens must be
those of the full model in which nothing attends to the dropped ones. They hold only if every kept token still carries
its own position. The error is the largest relative difference over the family's tiny models in `tests/hosts.py`
({hosts} in all) and over ratios .5, .75, .918 and .05 (fewer patches dropped than there are prefix tokens), hidden
states and pooled outputs; `tests/test_oracle.py` demands at most 2e-5. Without masked keys the full model differs by
at least 3e-3.

*Error*: the oracle's. *Seam*: the host's own slot for patch dropout, in which the drop stands, or a hook on the module
that returns the tokens.

Where a family drops before the projection, `tests/test_pixels.py` demands the draws, hidden states and gradients of
stage "tokens" to 1e-10 of their largest value in float64. Models that are built with a norm or a stem in their patch
embedding, or with dropout on their embeddings, raise (`describe` tells); so do calls with masked positions, or patches,
of your own.

## What to know

- **Heads.** Any model around these towers is masked as well, if it takes the class token, pools by mean or attention,
  resamples to a fixed number of tokens, or attends across: classification, contrastive, captioning and dual-encoder
  models. The models column names them. Detection from patches, dense prediction, masked image modelling and language
  models that reserve a place for every patch are refused (below).
- **Dense feature maps** (`forward_intermediates` with NCHW, `features_only`, `get_intermediate_layers(reshape=True)`)
  raise while patches are dropped: the kept tokens do not fill a map. `output_fmt="NLC"` and eval mode work.
- **Gradient checkpointing.** Where a layer makes its own position bias, or computes its positions, the draw travels
  to it as an argument, so a recomputation after another forward uses the draw it belongs to. One exception raises:
  V-JEPA 2 with transformers before 5.6, whose layers take no further arguments.
- **Pooled outputs that read a patch.** I-JEPA's and Janus' `pooler_output` is made of the first token, which is a
  patch: under a drop it is the first kept one. Use the tokens or their mean, as their heads do.
- **Attention masks of your own** over all tokens (`attention_mask` of ViT, DeiT, DINOv2, BEiT, FLAVA, `attn_mask` of
  timm) do not follow the drop, and raise while patches are dropped. The padding masks of the hosts with a note on grids
  do follow. `is_causal` needs `ordered=True`.
- **The mode** of the drop is that of the tower, also where its embeddings alone are frozen in eval mode.
- **Time.** In a video the grid is (T, H, W): a Gaussian is laid over each frame alike, and the patches of all frames
  compete for the same K places, so nothing prefers a time.
- **Rules that look at the images.** Every family gives a rule the pixels and, at stage "tokens", the tokens that it
  asks for. Models that are built with a convolutional stem in front of their patches (hybrids, ViTamin) have no patches
  of pixels, and raise at attach. SigLIP 2 with a padding mask draws before its embeddings; for a rule that asks for
  tokens it embeds twice.
- **Padding.** Where images of many sizes share a padded batch, the Gaussian is laid over each image's own grid, K
  follows the padded N, and padding is kept only where an image has fewer than K patches.

## Refused

`attach` raises `UnsupportedModelError` with the reason. Class names are given by their beginning.

{refused}

Models that contain a masked tower and use its tokens in a way that fewer tokens make wrong are refused by what they
are:

{owners}

and any model of transformers whose config names image tokens in a text (`image_token_id` and the like), unless a
Q-Former or a perceiver makes their number independent of the patches (BLIP-2, InstructBLIP, KOSMOS-2 and 2.5, IDEFICS
and IDEFICS 2).

## Versions

{tried}
"""

TRIED = """The oracle (`pytest tests/test_oracle.py`) and what attach promises (`pytest tests/test_attach.py
tests/test_distributed.py`: eval, modes, copies, pickles, save_pretrained, compile, checkpointing, autocast, DDP in one
and two processes, FSDP2), November 2026, Python 3.11, 2 CPU cores. The first row is the oldest that the lower bounds
admit. Skipped are families that the older libraries lack.

| torch | timm | transformers | open_clip | einops | oracle | attach and distributed |
|---|---|---|---|---|---|---|
| 2.6.0 | 1.0.20 | 5.0.0 | 3.0.0 | 0.7.0 | 476 passed, 36 skipped | 263 passed, 83 skipped, 5 failed |
| 2.15.0 | 1.0.31 | 5.12.1 | 3.3.0 | 0.8.2 | 500 passed, 12 skipped | 339 passed, 12 skipped |
| 2.15.0 | 1.0.31 | 5.23.0 | 3.3.0 | 0.8.2 | 512 passed | 351 passed |
| 2.15.0 | 1.0.31 | 5.24.0 | 3.3.0 | 0.8.2 | 512 passed | 351 passed |

The five failures with the oldest versions are not of the masking: `torch.compile(fullgraph=True)` breaks in
transformers' own decorators under torch 2.6 (DINOv3, MLCD, YOLOS, ViViT), and `TimmWrapperModel.from_pretrained`
builds timm 1.0.20's model on the meta device, where it cannot be built. FSDP2 does not run on the CPU with torch 2.6
(52 skipped), and V-JEPA 2 with gradient checkpointing raises before transformers 5.6, as said above.

These counts are of stage "tokens". Stage "pixels" was run with torch 2.14.1, timm 1.0.31, transformers 5.24.0 and
open_clip 3.3.0, and with the oldest versions.

The oldest versions on Python 3.10 pass all other tests as well, but for those that `noxfile.py` leaves out of `nox -s
oldest`, each for a reason that lies in those versions. These matter in use: torch 2.6 breaks the graph at stage
"pixels" (`fullgraph=True` raises, without it the model compiles) and exports an attached model only with
`strict=False`, or detached; and with or without a drop, torch 2.6 compiles wrong gradients of embeddings on the CPU and
exports a dynamic batch only with a largest size, and in transformers 5.0 the loss of `GitForCausalLM` and the
cross-attention of KOSMOS-2 are wrong.

In between, torch 2.11.0 with timm 1.0.31, transformers 5.17.0 and open_clip 3.3.0 passes the library's own tests on a
CPU (`nox -s between`), but for RADIO, which takes no packed images in that transformers, and KOSMOS-2, whose
cross-attention is causal there. On an H200 it passed the tests marked `cuda` but for four, of compiling transformers'
CLIP; that fault is mended, and they pass with that torch on a CPU.

`make versions` runs the tests with the oldest and with the newest versions."""


def describe_all() -> dict[str, str]:
    """By family, the models that attach accepts."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for name in tqdm(timm.list_models(), desc="timm"):
        with on_meta():
            found[gaussmask.describe(timm.create_model(name)).family].append(name)
    models = {family: f"{len(names)} names: `{names[0]}` ..." for family, names in found.items() if family}
    transformers.logging.set_verbosity_error()
    classes: dict[str, list[str]] = collections.defaultdict(list)
    for cls in tqdm(list(vision_classes()), desc="transformers"):
        model = build_on_meta(cls)
        if model is not None and (family := gaussmask.describe(model).family):
            classes[family].append(cls.__name__)
    for family, names in classes.items():
        if family not in models:  # a wrapper of a timm model counts with it
            models[family] = ", ".join(sorted(names))
    return models


def largest_errors() -> dict[str, str]:
    """By family, the oracle's largest error over all tiny models and ratios."""
    errors: dict[str, float] = collections.defaultdict(float)
    for host in tqdm(ALL.values(), desc="oracle"):
        family = gaussmask.describe(host.build()).family
        for share in DROPS:
            answer = ask(host, share)
            errors[family] = max(errors[family], answer.hidden, answer.pooled or 0)
    return {family: f"{error:.1e}" for family, error in errors.items()}


def measure() -> dict[str, Measured]:
    errors, models = largest_errors(), describe_all()
    return {family: Measured(models.get(family, "as built by you"), error) for family, error in errors.items()}


def tiny_models() -> dict[str, Any]:
    """By family, the first of its tiny models."""
    tiny: dict[str, Any] = {}
    for host in ALL.values():
        model = host.build()
        tiny.setdefault(gaussmask.describe(model).family, model)
    return tiny


def masked_table(measured: dict[str, Measured], tiny: dict[str, Any]) -> str:
    tables = []
    for library in LIBRARIES:
        rows = []
        for family in families(library):
            found = gaussmask.describe(tiny[family])
            prefix = HOSTS[family.replace(" ", ".")].prefix
            front = "as the model has" if callable(prefix) else str(prefix)
            always = f"{front} + {found.num_suffix_tokens} behind" if found.num_suffix_tokens else front
            notes = " ".join([*(f"{what}." for what in found.besides), found.note]).strip()
            pixels = f"no: {found.pixels_reason}" if found.pixels_reason else f"yes {found.pixels_only}".strip()
            rows.append([family.split()[1], measured[family].models, always, pixels, notes])
        tables.append(f"### {library}\n\n{folding(['family', 'models', 'always kept', 'pixels', 'notes'], rows)}")
    return "\n\n".join(tables)


def proof_table(measured: dict[str, Measured], tiny: dict[str, Any]) -> str:
    rows = []
    for library in LIBRARIES:
        for family in families(library):
            seam = re.sub(r"[\w.]*\.(\w+)", r"\1", gaussmask.describe(tiny[family]).seam)
            seam = seam.replace("forward ", "").replace("stands in for", "slot")
            rows.append([library, family.split()[1], measured[family].error, seam])
    head = f"Error and seam of all {len(rows)} families"
    table = folding(["library", "family", "error", "seam"], rows)
    return f"<details markdown>\n<summary>{head}</summary>\n\n{table}\n\n</details>"


def families(library: str) -> list[str]:
    """The names of a library's families, as `describe` has them."""
    return [key.replace(".", " ") for key in HOSTS if key.startswith(f"{library}.")]


def folding(heads: list[str], rows: list[list[str]]) -> str:
    """A table whose rows become cards on a narrow screen."""
    lines = [" | ".join(cells) for cells in [heads, ["---"] * len(heads), *rows]]
    table = "\n".join(f"| {line} |" for line in lines)
    return f'<div class="folds" markdown>\n\n{table}\n\n</div>'


def refused_table() -> str:
    rows = []
    for library, reasons in REFUSED.items():
        rows += [[library, why, " ".join(beginnings.split())] for why, beginnings in reasons.items()]
    return folding(["library", "reason", "classes"], rows)


def owners_table() -> str:
    patterns = {pattern.replace("|", "\\|"): why for pattern, why in REFUSED_OWNERS.items()}
    return folding(["classes (pattern)", "reason"], [[f"`{pattern}`", why] for pattern, why in patterns.items()])


def render(measured: dict[str, Measured], versions: str) -> str:
    tiny = tiny_models()
    return TEXT.format(
        versions=versions, hosts=len(ALL), masked=masked_table(measured, tiny), proofs=proof_table(measured, tiny),
        refused=refused_table(), owners=owners_table(), tried=TRIED,
    )  # fmt: skip


def parse(page: str) -> tuple[dict[str, Measured], str]:
    """The measured part of a page."""
    models, errors, library = {}, {}, ""
    for line in page.partition("## Masked")[2].partition("## What")[0].splitlines():
        library = line[4:] if line.startswith("### ") else library
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 5 and cells[0] not in ("family", "---"):
            models[f"{library} {cells[0]}"] = cells[1]
        if len(cells) == 4 and cells[0] in LIBRARIES:
            errors[f"{cells[0]} {cells[1]}"] = cells[2]
    measured = {family: Measured(models[family], error) for family, error in errors.items()}
    return measured, re.search(r"Measured with (.*)\.\n", page)[1]  # type: ignore[index]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    libraries = {"torch": torch, "timm": timm, "transformers": transformers, "open_clip": open_clip}
    versions = ", ".join(f"{name} {library.__version__.partition('+')[0]}" for name, library in libraries.items())
    PAGE.write_text(render(measure(), versions), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
