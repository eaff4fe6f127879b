"""`describe` says beforehand what `attach` does, and changes nothing."""

import math

import pytest
import torch
from hosts import ALL, REPRESENTATIVE, make_open_tower, make_timm, x_images

import gaussmask
from gaussmask import RandomPatchDropout


@pytest.mark.parametrize("name", ALL)
def test_what_is_described_is_what_happens(name):
    torch.manual_seed(0)
    host, drop = ALL[name], RandomPatchDropout(0.75)
    model = host.build()
    before = {key: len(module._forward_hooks) + len(module._forward_pre_hooks) for key, module in model.named_modules()}
    found = gaussmask.describe(model)
    assert before == {
        key: len(module._forward_hooks) + len(module._forward_pre_hooks) for key, module in model.named_modules()
    }
    assert found.supported
    assert (found.num_prefix_tokens, found.num_suffix_tokens) == (host.prefix, host.suffix)
    assert type(model.get_submodule(found.path)).__name__ == found.family.split()[1] or "timm" in found.family
    gaussmask.attach(model, drop)(**host.inputs(2))
    if drop.keep_mask.shape[1:] == found.grid_size:
        assert found.kept[0.75] == drop.keep_indices.shape[1]
    assert gaussmask.describe(model) == found, "a model that carries a drop can be attached to again"
    assert all(text in str(found) for text in (type(model).__name__, found.family, found.seam))


def test_the_grid_is_that_of_the_configuration():
    """At the usual sizes, as hosts name them in their own ways."""
    for name in REPRESENTATIVE:
        host = ALL[name]
        found = gaussmask.describe(host.build())
        if found.grid_size is not None:
            assert found.grid_size == (host.grid or found.grid_size)
            assert found.kept == {
                ratio: max(1, math.floor(math.prod(found.grid_size) * (1 - ratio) + 1e-6))
                for ratio in (0.5, 0.75, 0.918)
            }
        else:
            assert found.kept == {}
    wide = gaussmask.describe(make_timm(img_size=(48, 32)))
    assert (wide.grid_size, wide.kept) == ((6, 4), {0.5: 12, 0.75: 6, 0.918: 1})
    assert gaussmask.describe(make_open_tower(image_size=(48, 32))).grid_size == (6, 4)


def test_text_at_a_glance():
    assert str(gaussmask.describe(ALL["transformers-YolosModel"].build())).splitlines() == [
        "YolosModel:",
        "  host          transformers YolosEmbeddings at 'embeddings'",
        "  seam          forward hook on embeddings",
        "  follows       positions added between the layers (InterpolateMidPositionEmbeddings)",
        "  always kept   1 in front, 3 behind",
        "  grid          6 x 6 as configured; a forward goes by its input",
        "  patches kept  18 at 0.5, 9 at 0.75, 2 at 0.918 of 36",
        "  stage         pixels",
    ]


def test_refusals_are_described_and_not_raised():
    found = gaussmask.describe(torch.nn.Linear(1, 1))
    assert not found.supported
    assert "no vision transformer" in found.reason
    assert (found.family, found.kept, found.grid_size) == ("", {}, None)
    assert str(found) == found.reason
    wrapped = torch.nn.Sequential(ALL["transformers-DINOv3ViTModel"].build().embeddings)
    assert str(gaussmask.describe(wrapped)).startswith("Sequential: DINOv3ViTEmbeddings")
    embeddings = ALL["transformers-DINOv3ViTModel"].build().embeddings
    assert "lacks the rotary positions" in gaussmask.describe(embeddings).reason
    compiled = torch.compile(make_timm())
    assert "attach first, compile second" in gaussmask.describe(compiled).reason


def test_the_reasons_for_all_families_of_a_library_read_as_sentences():
    """Class, verb and reason: `Swin cannot be masked: it attends within windows of the full grid`."""
    from gaussmask.hosts.refusals import REFUSED, reason_against

    for library, reasons in REFUSED.items():
        for why, beginnings in reasons.items():
            assert why.startswith(("it ", "its ", "each of its "))
            for beginning in beginnings.split():
                assert reason_against([f"{library}.{beginning}"]), beginning
    assert reason_against(["transformers.Nothing", "timm.Swim"]) is None


def test_an_attached_model_still_answers():
    model, drop = make_timm(), RandomPatchDropout(0.5)
    gaussmask.attach(model, drop)
    assert gaussmask.describe(model).supported
    assert gaussmask.attached(model) is drop
    model(**x_images(2))
    assert drop.keep_indices.shape == (2, 18)
