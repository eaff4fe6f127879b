"""Claims C1 and C3 to C6 of the papers, as rows of differences: GLIP against FLIP, and small images beside them."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from claim.design import (
    OBJECT_SIZE,
    RATIO,
    RATIOS,
    RECALLS,
    SCENES,
    Claim,
    Row,
    Setting,
    flip,
    glip,
    scenes,
    small_images,
    weighted,
)

SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.8)
CENTERINGS = (1.0, 0.5, 0.0)
OTHER_OBJECT_SIZES = (0.25, 0.65)


def papers_claims(setting: Setting) -> list[Claim]:
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
        small = small_images(data.name, RATIOS[-1])
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
