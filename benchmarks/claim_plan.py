"""The papers' claims as rows of differences between two methods, and the runs that the rows need.

    claims -> rows -> pairs of runs -> the plan: every run once, for every seed

A run is one training from random weights. Both runs of a pair have everything in common but the mask, and are compared
seed by seed. The rule that turns differences into verdicts is in docs/claims-rule.md.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from arithmetic import Tower
from clip_training import Config as Recipe

from gaussmask.functional import num_kept_patches

RATIOS = (0.5, 0.75, 0.918)
RATIO = 0.75  # where one ratio must do
SIGMA = 0.2  # the authors' default
SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.8)
CENTERINGS = (1.0, 0.5, 0.0)
OBJECT_SIZE, OTHER_OBJECT_SIZES = 0.4, (0.25, 0.65)
SCENES = "scenes"
GRID = 8  # patches per side, whatever the size of the images
RECALLS = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))
MAY_DIFFER = {"method", "sigma", "sampling"}  # between the two runs of a pair


@dataclass(frozen=True, order=True)
class Run:
    """One training.

    Args:
        data: name of a data set, or `SCENES`.
        method: flip, glip or reclip.
        mask_ratio: share of the patches that are dropped; of reclip, whose number of tokens is a square, the ratio that
            it comes closest to from below.
        sigma, sampling: of glip.
        train_images: train on the first so many; None is all of them.
        centering, object_size: of scenes, see `captioned_scenes.make_scenes`.
    """

    data: str
    method: str
    mask_ratio: float
    seed: int = 0
    sigma: float | None = None
    sampling: str | None = None
    train_images: int | None = None
    centering: float | None = None
    object_size: float | None = None

    def __str__(self) -> str:
        named = {name: value for name, value in vars(self).items() if name not in ("data", "method", "mask_ratio")}
        extra = [f"{name} {value}" for name, value in named.items() if value is not None]
        return ", ".join([f"{self.data} {self.method} {self.mask_ratio:g}", *extra])


@dataclass(frozen=True)
class Row:
    """A line of a table: the mean, over pairs and figures, of the first run's figure less the second's.

    Args:
        labels: the leading columns.
        pairs: of runs, whose seed does not matter here.
        figures: `stage.split.measure`, see claim_run.py.
        margin: the claim is that the difference lies above it.
        primary: whether the verdict on the claim rests on this row.
    """

    labels: Mapping[str, str]
    pairs: Sequence[tuple[Run, Run]]
    figures: Sequence[str]
    margin: float = 0.0
    primary: bool = False


@dataclass(frozen=True)
class Claim:
    """Rows with the same columns, and what they are to tell.

    Args:
        sides: what the tables call the two runs of a pair.
        passes: whether the tables say how often a training image was seen.
    """

    name: str
    title: str
    rows: Sequence[Row]
    sides: tuple[str, str] = ("GLIP", "FLIP")
    passes: bool = False


@dataclass(frozen=True)
class DataSet:
    """A folder of shards, `NAME/SPLIT.tar` (or `.tar.gz`), with a split `train`.

    Args:
        image_size: to which images are resized, in pixels.
        splits: that are evaluated; the first is the one of all rows that name no other.
    """

    name: str
    image_size: int
    splits: tuple[str, ...] = ("test",)


@dataclass(frozen=True)
class Setting:
    """What is trained, and on what: the same for every run.

    Args:
        recipe: of examples/clip_training.py; only what belongs to the data is set anew for a run.
        steps, tuning_steps: of `recipe.batch_size` images each.
        class_sets: data with class labels; the first one is that of the claims that take one set only.
        retrieval_set: data with several captions per image.
        retrieval_context: its context length, for captions are longer than prompts.
        scene_size: of the generated scenes, in pixels.
        test_images: at most so many of every split are evaluated; so many scenes are made for testing.
        probe_images: the linear probe is fitted on the first so many training images.
        fewer_images: sizes of smaller training sets, by data.
        cost_models: models whose costs are measured, with their batch, by name.
        cost_rounds: of measuring the costs.
    """

    recipe: Recipe
    steps: int
    tuning_steps: int
    class_sets: tuple[DataSet, ...]
    retrieval_set: DataSet
    retrieval_context: int
    scene_size: int
    test_images: int
    probe_images: int
    fewer_images: Mapping[str, Sequence[int]]
    cost_models: Mapping[str, Recipe]
    cost_rounds: int

    @property
    def num_scenes(self) -> int:
        """So many that each is seen once."""
        return self.steps * self.recipe.batch_size

    @property
    def data_names(self) -> set[str]:
        return {SCENES, *(data.name for data in (*self.class_sets, self.retrieval_set))}

    def data_set(self, name: str) -> DataSet:
        return next(data for data in (*self.class_sets, self.retrieval_set) if data.name == name)

    def recipe_of(self, run: Run) -> Recipe:
        """The recipe with the size and the captions of the run's data; epochs are left to the training."""
        size = self.scene_size if run.data == SCENES else self.data_set(run.data).image_size
        retrieval = run.data == self.retrieval_set.name
        context = self.retrieval_context if retrieval else self.recipe.context_length
        return replace(self.recipe, image_size=size, patch_size=size // GRID, context_length=context)


CIFAR10 = DataSet("cifar10", 32)
TINY_IMAGENET = DataSet("tiny-imagenet", 64, ("val", "val-centred", "val-offcentre"))
FLICKR8K = DataSet("flickr8k", 64)


def full_setting(device: str, class_sets: tuple[DataSet, ...] = (CIFAR10, TINY_IMAGENET)) -> Setting:
    """What docs/claims-rule.md says."""
    recipe = Recipe(
        width=96, depth=3, head_width=32, text_depth=1, embed_dim=64, batch_size=256, precision="fp32", device=device
    )
    vit_small = replace(
        recipe, image_size=224, patch_size=16, width=384, depth=12, head_width=64, text_depth=12, embed_dim=512,
        context_length=77, batch_size=8,
    )  # fmt: skip
    return Setting(
        recipe=recipe,
        steps=300,
        tuning_steps=23,
        class_sets=class_sets,
        retrieval_set=FLICKR8K,
        retrieval_context=32,
        scene_size=32,
        test_images=5000,
        probe_images=5000,
        fewer_images={SCENES: (12_800, 1_536), class_sets[0].name: (12_500, 3_125)},
        cost_models={"the recipe's model": recipe, "ViT-S/16, 224 px": vit_small},
        cost_rounds=40,
    )


def smoke_setting() -> Setting:
    """Every row in a few steps of a tiny model: shows that all of it runs, and nothing else."""
    recipe = Recipe(
        width=32, depth=1, head_width=16, text_depth=1, embed_dim=16, batch_size=16, precision="fp32", device="cpu"
    )
    return Setting(
        recipe=recipe,
        steps=2,
        tuning_steps=1,
        class_sets=(CIFAR10, replace(TINY_IMAGENET, image_size=32)),
        retrieval_set=replace(FLICKR8K, image_size=32),
        retrieval_context=24,
        scene_size=16,
        test_images=24,
        probe_images=160,
        fewer_images={SCENES: (16,), CIFAR10.name: (16,)},
        cost_models={"the recipe's model": recipe},
        cost_rounds=2,
    )


def claims(setting: Setting) -> list[Claim]:
    """All that are tested by training; the costs (C2) are measured apart."""
    return [
        Claim("C1", "Centred masking beats random masking at equal tokens", list(_c1(setting))),
        Claim(
            "C6a", "At .918 the additive rule falls below FLIP until it is tuned", list(_c6a(setting)), ("FLIP", "GLIP")
        ),
        Claim("C6b", "Weighted sampling repairs the fall", list(_c6b(setting)), ("weighted", "other")),
        Claim("C4", "It helps also without a centre focus", list(_c4(setting))),
        Claim("C5", "It carries to retrieval and to frozen features", list(_c5(setting))),
        Claim("C3", "No delicate tuning of sigma", list(_c3(setting))),
        Claim("C6", "Small images instead of masks, at about as many tokens", list(_c6(setting)), ("RECLIP", "other")),
        Claim("border", "Where the border lies", list(_border(setting)), passes=True),
    ]


def plan(of: Sequence[Claim], seeds: Sequence[int]) -> dict[Run, set[str]]:
    """Every run that the rows need, with the figures that they need of it; row by row, so that stopping leaves whole
    rows."""
    needed: dict[Run, set[str]] = {}
    for row in itertools.chain.from_iterable(claim.rows for claim in of):
        for seed, pair in itertools.product(seeds, row.pairs):
            for run in pair:
                needed.setdefault(replace(run, seed=seed), set()).update(row.figures)
    return needed


def work(run: Run, setting: Setting) -> float:
    """Operations of a run, roughly: for the bar, and for the plan's cost."""
    recipe = setting.recipe_of(run)
    kept = num_kept_patches(GRID**2, run.mask_ratio)
    text = Tower(recipe.context_length, recipe.width, recipe.text_depth).flops

    def image(patches: int) -> int:
        return Tower(1 + patches, recipe.width, recipe.depth, GRID**2, 3 * recipe.patch_size**2).flops

    trained = setting.steps * (image(kept) + text) + setting.tuning_steps * (image(GRID**2) + text)
    splits = 1 if run.data == SCENES else len(setting.data_set(run.data).splits)
    return 3.0 * recipe.batch_size * trained + 2.0 * splits * min(setting.test_images, 2500) * image(GRID**2)


def flip(data: str, mask_ratio: float = RATIO, **more: Any) -> Run:
    return Run(data, "flip", mask_ratio, **more)


def glip(data: str, mask_ratio: float = RATIO, sigma: float = SIGMA, sampling: str = "additive", **more: Any) -> Run:
    return Run(data, "glip", mask_ratio, sigma=sigma, sampling=sampling, **more)


def weighted(data: str, mask_ratio: float = RATIO) -> Run:
    return glip(data, mask_ratio, sampling="weighted")


def scenes(method: Any, centering: float, **more: Any) -> Run:
    """A run of `flip` or `glip` on scenes."""
    run: Run = method(SCENES, centering=centering, **({"object_size": OBJECT_SIZE} | more))
    return run


def _over_ratios(
    name: str, split: str, stages: Sequence[str], primary_stage: str | None, labels: Mapping[str, str]
) -> Iterator[Row]:
    """GLIP less FLIP at each ratio, and the mean of the ratios, which is the primary row at `primary_stage`."""
    for stage in stages:
        figures = [f"{stage}.{split}.top1"]
        by_ratio = [(glip(name, ratio), flip(name, ratio)) for ratio in RATIOS]
        for ratio, pair in zip(RATIOS, by_ratio, strict=True):
            yield Row({**labels, "stage": stage, "ratio": f"{ratio:g}"}, [pair], figures)
        yield Row({**labels, "stage": stage, "ratio": "mean"}, by_ratio, figures, primary=stage == primary_stage)


def _c1(setting: Setting) -> Iterator[Row]:
    for data in setting.class_sets:
        yield from _over_ratios(
            data.name, data.splits[0], ("masked", "unmasked", "tuned"), "tuned", {"data": data.name}
        )


def _c3(setting: Setting) -> Iterator[Row]:
    data = setting.class_sets[0]
    for sampling, sigma in itertools.product(("additive", "weighted"), SIGMAS):
        labels = {"data": data.name, "sampling": sampling, "sigma": f"{sigma:g}"}
        pair = (glip(data.name, sigma=sigma, sampling=sampling), flip(data.name))
        yield Row(labels, [pair], [f"tuned.{data.splits[0]}.top1"], margin=-1.0, primary=sampling == "additive")


def _c4(setting: Setting) -> Iterator[Row]:
    for data in setting.class_sets:
        for split in data.splits[1:]:
            primary = "tuned" if split.endswith("offcentre") else None
            yield from _over_ratios(data.name, split, ("unmasked", "tuned"), primary, {"data": f"{data.name}, {split}"})
    for centering, stage in itertools.product(CENTERINGS, ("masked", "unmasked", "tuned")):
        labels = {"data": f"scenes, centering {centering:g}", "stage": stage, "ratio": f"{RATIO:g}"}
        pair = (scenes(glip, centering), scenes(flip, centering))
        yield Row(labels, [pair], [f"{stage}.test.top1"], primary=centering == 0 and stage == "tuned")


def _c5(setting: Setting) -> Iterator[Row]:
    data = setting.retrieval_set
    pair = (glip(data.name), flip(data.name))
    for stage in ("unmasked", "tuned"):
        for measures in (*([recall] for recall in RECALLS), RECALLS):
            name = measures[0] if len(measures) == 1 else "mean of recalls"
            figures = [f"{stage}.{data.splits[0]}.{measure}" for measure in measures]
            primary = stage == "tuned" and len(measures) > 1
            yield Row({"data": data.name, "figure": name, "stage": stage}, [pair], figures, primary=primary)
    for classes in setting.class_sets:
        pair = (glip(classes.name), flip(classes.name))
        labels = {"data": classes.name, "figure": "linear probe", "stage": "tuned"}
        yield Row(labels, [pair], [f"tuned.{classes.splits[0]}.probe"], primary=True)


def _c6a(setting: Setting) -> Iterator[Row]:
    for data, stage in itertools.product(setting.class_sets, ("masked", "unmasked", "tuned")):
        pair = (flip(data.name, RATIOS[-1]), glip(data.name, RATIOS[-1]))
        labels = {"data": data.name, "stage": stage, "difference": "FLIP − GLIP"}
        yield Row(labels, [pair], [f"{stage}.{data.splits[0]}.top1"], primary=stage == "unmasked")


def _c6b(setting: Setting) -> Iterator[Row]:
    for data, stage in itertools.product(setting.class_sets, ("masked", "unmasked", "tuned")):
        figures = [f"{stage}.{data.splits[0]}.top1"]
        for name, other in (("GLIP", glip(data.name, RATIOS[-1])), ("FLIP", flip(data.name, RATIOS[-1]))):
            labels = {"data": data.name, "stage": stage, "difference": f"weighted − {name}"}
            pair = (weighted(data.name, RATIOS[-1]), other)
            yield Row(labels, [pair], figures, primary=stage == "unmasked" and name == "GLIP")


def _c6(setting: Setting) -> Iterator[Row]:
    for data, stage in itertools.product(setting.class_sets, ("masked", "unmasked", "tuned")):
        small = Run(data.name, "reclip", RATIOS[-1])
        others = {
            "FLIP": flip(data.name, RATIOS[-1]),
            "GLIP": glip(data.name, RATIOS[-1]),
            "weighted": weighted(data.name, RATIOS[-1]),
        }
        for name, other in others.items():
            labels = {"data": data.name, "stage": stage, "difference": f"RECLIP − {name}"}
            yield Row(labels, [(small, other)], [f"{stage}.{data.splits[0]}.top1"])


def _border(setting: Setting) -> Iterator[Row]:
    def row(varied: str, data: str, split: str, **of_both: Any) -> Row:
        images = of_both.get("train_images")
        place = ", ".join(
            [
                data,
                *([f"object {of_both['object_size']:g} of the side"] if varied == "object" else []),
                *([f"centering {of_both['centering']:g}"] if data == SCENES else []),
                *(["all images" if images is None else f"{images:,} images"] if varied == "passes" else []),
            ]
        )
        pair = (glip(data, **of_both), flip(data, **of_both))
        return Row({"varied": varied, "data": place}, [pair], [f"tuned.{split}.top1"])

    for count in (None, *setting.fewer_images[SCENES]):
        yield row("passes", SCENES, "test", centering=1.0, object_size=OBJECT_SIZE, train_images=count)
    data = setting.class_sets[0]
    for count in (None, *setting.fewer_images[data.name]):
        yield row("passes", data.name, data.splits[0], train_images=count)
    for centering, size in itertools.product((0.0, 1.0), sorted((OBJECT_SIZE, *OTHER_OBJECT_SIZES))):
        yield row("object", SCENES, "test", centering=centering, object_size=size)
