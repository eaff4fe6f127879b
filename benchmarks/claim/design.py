"""What is compared: a run, a row of two runs that differ by one thing, a claim of rows, and the setting of all of them.

A run is one training from random weights. Both runs of a pair have everything in common but what is compared, and are
compared seed by seed. The rule that turns differences into verdicts is in docs/claims-rule.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clip_training import Config as Recipe

RATIOS = (0.5, 0.75, 0.918)
RATIO = 0.75  # where one ratio must do
SIGMA = 0.2  # the authors' default
OBJECT_SIZE = 0.4
SCENES = "scenes"
NAMES = {
    "cifar10": "CIFAR-10",
    "tiny-imagenet": "Tiny-ImageNet",
    "fashion": "fashion",
    "eurosat": "EuroSAT",
    "flickr8k": "Flickr8k",
}
MOST_SCENES = 76_800
GRID = 8  # patches per side, whatever the size of the images
CLUSTERS = tuple((anchors, noise) for anchors in (0.03, 0.1) for noise in (0.05, 0.1, 0.3))
GROWING = {"method": "glip", "schedule": "growing"}
TRIES: tuple[
    Mapping[str, Any], ...
] = (  # to beat random patches: all with the library's own settings, so none is tuned
    {"method": "cluster", "schedule": "half random"},
    {"method": "cluster", "schedule": "late random"},
    GROWING,
    {"method": "flip", "schedule": "two views"},
    {"method": "grid"},
    {"method": "cluster", "anchors": 0.03, "noise": 0.1},
)
RECALLS = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))
Results = Mapping["Run", Mapping[str, float]]  # of every run that has ended, its figures by name


@dataclass(frozen=True, order=True)
class Run:
    """One training.

    Args:
        data: name of a data set, or `SCENES`.
        method: reclip (small images), or one of `clip_step.make_drop`: clip, flip, glip, grid, block, cluster.
        mask_ratio: share of the patches that are dropped; of reclip, whose number of tokens is a square, the ratio that
            it comes closest to from below.
        sigma, sampling: of glip.
        train_images: train on the first so many; None is all of them.
        centering, object_size: of scenes, see `captioned_scenes.make_scenes`.
        anchors, noise: of cluster.
        schedule: of schedules.py: a mask that changes while the model trains.
        lr: instead of the recipe's.
        budget: operations of training and tuning together, in steps of a model without a mask, instead of the
            setting's numbers of steps.
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
    anchors: float | None = None
    noise: float | None = None
    schedule: str | None = None
    lr: float | None = None
    budget: int | None = None

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
        figures: `stage.split.measure`, see run.py.
        margin: the claim is that the difference lies above it.
        primary: whether the verdict on the claim rests on this row.
        comparisons: rows that are read together: the interval is so wide that all of theirs hold at once (Bonferroni).
    """

    labels: Mapping[str, str]
    pairs: Sequence[tuple[Run, Run]]
    figures: Sequence[str]
    margin: float = 0.0
    primary: bool = False
    comparisons: int = 1

    @property
    def mask(self) -> str | None:
        """What the row is about, as its table says it, where masks are compared."""
        return self.labels.get("mask", self.labels.get("method"))


@dataclass(frozen=True)
class Claim:
    """Rows with the same columns, and what they are to tell.

    Args:
        sides: what the tables call the two runs of a pair.
        passes: whether the tables say how often a training image was seen.
        seeds: of its runs, if it has seeds of its own: what is chosen by them is judged on others.
        waits: whether rows are missing, because what they compare is not chosen yet; then there is no verdict.
    """

    name: str
    title: str
    rows: Sequence[Row]
    sides: tuple[str, str] = ("GLIP", "FLIP")
    passes: bool = False
    seeds: tuple[int, ...] | None = None
    waits: bool = False


@dataclass(frozen=True)
class Choice:
    """What is tried before it is compared: the candidate with the highest mean of `figure` over the seeds is taken. A
    single candidate is taken untried.

    Args:
        candidates: runs, whose seed does not matter here.
    """

    candidates: Sequence[Run]
    figure: str
    seeds: tuple[int, ...]

    def taken(self, results: Results) -> Run | None:
        """None as long as a run is missing."""
        if len(self.candidates) == 1:
            return self.candidates[0]
        means = {}
        for candidate in self.candidates:
            found = [results.get(replace(candidate, seed=seed), {}).get(self.figure) for seed in self.seeds]
            complete = [figure for figure in found if figure is not None]
            if len(complete) < len(found):
                return None
            means[candidate] = sum(complete) / len(complete)
        return max(means, key=lambda run: means[run])


@dataclass(frozen=True)
class DataSet:
    """A folder of shards, `NAME/SPLIT.tar` (or `.tar.gz`), with a split `train`.

    Args:
        image_size: to which images are resized, in pixels.
        splits: that are evaluated; the first is the one of all rows that name no other.
        template: prompt of the zero-shot classifier, with `{}` for the name of the class.
        retrieval: whether captions are so many that images can be found by them.
        context_length: of the captions, if the recipe's is too short.
        uneven: whether some classes have many more images than others, so that top-1 is mostly about those.
    """

    name: str
    image_size: int
    splits: tuple[str, ...] = ("test",)
    template: str = "a photo of a {}."
    retrieval: bool = False
    context_length: int | None = None
    uneven: bool = False


@dataclass(frozen=True)
class Setting:
    """What is trained, and on what: the same for every run.

    Args:
        recipe: of examples/clip_training.py; only what belongs to the data is set anew for a run.
        steps, tuning_steps: of `recipe.batch_size` images each.
        class_sets: data with class labels; the first one is that of the claims that take one set only.
        more_class_sets: of the claims on masks (C0, C7), which take all of them.
        retrieval_set: data with several captions per image.
        more_retrieval_sets: of the claim on masks (C7).
        scene_size: of the generated scenes, in pixels.
        test_images: at most so many of every split are evaluated; so many scenes are made for testing.
        probe_images: the linear probe is fitted on the first so many training images.
        fewer_images: sizes of smaller training sets, by data.
        cost_models: models whose costs are measured, with their batch, by name.
        cost_rounds: of measuring the costs.
        budget: of C0, see `Run`; its learning rates are chosen by runs of a third of it.
        curve_images: so many of the first split are evaluated for a curve.
        clusters: anchors and noise of cluster that are tried, see `Choice`.
        tries: masks that may beat random patches, most of which change while the model trains, as fields of `Run`;
            likewise.
    """

    recipe: Recipe
    steps: int
    tuning_steps: int
    class_sets: tuple[DataSet, ...]
    more_class_sets: tuple[DataSet, ...]
    retrieval_set: DataSet
    more_retrieval_sets: tuple[DataSet, ...]
    scene_size: int
    test_images: int
    probe_images: int
    fewer_images: Mapping[str, Sequence[int]]
    cost_models: Mapping[str, Recipe]
    cost_rounds: int
    budget: int
    curve_images: int
    clusters: Sequence[tuple[float, float]] = CLUSTERS
    tries: Sequence[Mapping[str, Any]] = TRIES

    @property
    def every_class_set(self) -> tuple[DataSet, ...]:
        return (*self.class_sets, *self.more_class_sets)

    @property
    def data_sets(self) -> tuple[DataSet, ...]:
        return (*self.every_class_set, self.retrieval_set, *self.more_retrieval_sets)

    @property
    def num_scenes(self) -> int:
        """So many that each is seen once, in runs that are not too long for that."""
        return min(self.steps * self.recipe.batch_size, MOST_SCENES)

    @property
    def data_names(self) -> set[str]:
        return {SCENES, *(data.name for data in self.data_sets)}

    def data_set(self, name: str) -> DataSet:
        return next(data for data in self.data_sets if data.name == name)

    def recipe_of(self, run: Run) -> Recipe:
        """The recipe with the size and the captions of the run's data; epochs are left to the training."""
        data = DataSet(SCENES, self.scene_size) if run.data == SCENES else self.data_set(run.data)
        return replace(
            self.recipe,
            image_size=data.image_size,
            patch_size=data.image_size // GRID,
            context_length=data.context_length or self.recipe.context_length,
            lr=run.lr or self.recipe.lr,
        )


CIFAR10 = DataSet("cifar10", 32)
TINY_IMAGENET = DataSet("tiny-imagenet", 64, ("val", "val-centred", "val-offcentre"))
FASHION = DataSet("fashion", 64, template="{}", retrieval=True, uneven=True)
EUROSAT = DataSet("eurosat", 64, template="a satellite photo of {}.")
FLICKR8K = DataSet("flickr8k", 64, retrieval=True, context_length=32)
RSICD = DataSet("rsicd", 96, retrieval=True, context_length=32)
CLASS_SETS = (CIFAR10, TINY_IMAGENET)


def full_setting(scale: str, class_sets: tuple[DataSet, ...] = CLASS_SETS) -> Setting:
    """What docs/claims-rule.md says, for two cores (`"cpu"`), or at the larger scale, for one GPU (`"gpu"`)."""
    setting = _cpu_setting(class_sets)
    if scale == "cpu":
        return setting
    recipe = replace(
        setting.recipe, width=256, depth=8, head_width=64, text_depth=3, embed_dim=256, batch_size=512,
        precision="bf16", device="cuda",
    )  # fmt: skip
    models = {name: replace(model, precision="bf16", device="cuda") for name, model in setting.cost_models.items()}
    return replace(
        setting,
        recipe=recipe,
        steps=400,
        tuning_steps=40,
        cost_models=models | {"the recipe's model": recipe},
        budget=400,
        clusters=((0.1, 0.05),),  # what the smaller runs have chosen
        tries=(GROWING,),
    )


def _cpu_setting(class_sets: tuple[DataSet, ...]) -> Setting:
    recipe = Recipe(
        width=96, depth=3, head_width=32, text_depth=1, embed_dim=64, batch_size=256, precision="fp32", device="cpu"
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
        more_class_sets=(FASHION, EUROSAT) if class_sets == CLASS_SETS else (),
        retrieval_set=FLICKR8K,
        more_retrieval_sets=(RSICD,),
        scene_size=32,
        test_images=5000,
        probe_images=5000,
        fewer_images={SCENES: (12_800, 1_536), class_sets[0].name: (12_500, 3_125)},
        cost_models={"the recipe's model": recipe, "ViT-S/16, 224 px": vit_small},
        cost_rounds=40,
        budget=300,
        curve_images=2000,
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
        more_class_sets=(replace(FASHION, image_size=32), replace(EUROSAT, image_size=32)),
        retrieval_set=replace(FLICKR8K, image_size=32, context_length=24),
        more_retrieval_sets=(replace(RSICD, image_size=32, context_length=24),),
        scene_size=16,
        test_images=24,
        probe_images=160,
        fewer_images={SCENES: (16,), CIFAR10.name: (16,)},
        cost_models={"the recipe's model": recipe},
        cost_rounds=2,
        budget=3,
        curve_images=16,
    )


def flip(data: str, mask_ratio: float = RATIO, **more: Any) -> Run:
    return Run(data, "flip", mask_ratio, **more)


def glip(data: str, mask_ratio: float = RATIO, sigma: float = SIGMA, sampling: str = "additive", **more: Any) -> Run:
    return Run(data, "glip", mask_ratio, sigma=sigma, sampling=sampling, **more)


def weighted(data: str, mask_ratio: float = RATIO) -> Run:
    return glip(data, mask_ratio, sampling="weighted")


def small_images(data: str, mask_ratio: float = RATIO) -> Run:
    return Run(data, "reclip", mask_ratio)


def scenes(method: Any, centering: float, **more: Any) -> Run:
    """A run of `flip` or `glip` on scenes."""
    run: Run = method(SCENES, centering=centering, **({"object_size": OBJECT_SIZE} | more))
    return run
