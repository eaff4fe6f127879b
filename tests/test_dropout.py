"""The dropout modules: modes, arguments, draws, copies, precision and compilation."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gaussmask import GaussianPatchDropout, PatchDropout, RandomPatchDropout, keep_probability

DROPS = {
    "random": RandomPatchDropout,
    "additive": GaussianPatchDropout,
    "weighted": lambda ratio, **options: GaussianPatchDropout(ratio, sampling="weighted", **options),
}
every_drop = pytest.mark.parametrize("make", DROPS.values(), ids=DROPS)


class NearestPatches(PatchDropout):
    """A subclass as a user would write it: the patches nearest to a point, without chance."""

    def scores(self, coords, generator=None):
        self.seen = coords
        return -(coords - coords.new_tensor([0.31, -0.23])).square().sum(dim=-1)


class Scores(PatchDropout):
    """Returns what the test put there."""

    def scores(self, coords, generator=None):
        return self.given


def rows(x, keep_indices, prefix):
    """Prefix and kept rows by advanced indexing."""
    return torch.cat([x[:, :prefix], x[torch.arange(len(x))[:, None], prefix + keep_indices]], dim=1)


@every_drop
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("grid_size", [None, (4, 9), (1, 36)])
def test_training_keeps_prefix_in_front_and_the_rows_of_keep_indices(make, prefix, grid_size):
    drop = make(0.75, num_prefix_tokens=prefix, grid_size=grid_size)
    x = torch.randn(3, prefix + 36, 4)
    kept = drop(x)
    assert kept.shape == (3, prefix + 9, 4)
    assert drop.keep_indices.dtype == torch.int64
    assert torch.equal(kept, rows(x, drop.keep_indices, prefix))
    assert drop.keep_mask.shape == (3, *(grid_size or (6, 6)))
    assert drop.keep_mask.dtype == torch.bool
    in_mask = [mask.flatten().nonzero().flatten() for mask in drop.keep_mask]
    assert torch.equal(torch.stack(in_mask), drop.keep_indices.sort(dim=1).values)


@every_drop
def test_eval_and_ratio_zero_return_the_same_object(make):
    """And forget the previous draw; drop.train() masks at inference, whatever the model around it does."""
    drop, x = make(0.5), torch.randn(2, 16, 4)
    model = torch.nn.Sequential(drop)
    model.eval()
    assert model(x) is x
    drop.train()
    assert model(x).shape == (2, 8, 4)
    assert drop.keep_indices.shape == (2, 8)
    drop.eval()
    assert drop(x) is x
    assert drop.keep_indices is None
    assert drop.keep_mask is None
    drop.train()(x)
    drop.mask_ratio = 0.0
    assert drop(x) is x
    assert drop.keep_indices is None


def test_arguments_may_be_set_at_run_time():
    drop, x = GaussianPatchDropout(0.5), torch.randn(2, 2 + 196, 4)
    drop.mask_ratio, drop.num_prefix_tokens, drop.grid_size, drop.ordered = 0.918, 2, [7, 28], True
    drop.sigma, drop.center, drop.sampling = 0.001, [0.0, 1.0], "weighted"  # steep: the right edge for certain
    assert drop(x).shape == (2, 2 + 16, 4)
    assert (drop.grid_size, drop.center) == ((7, 28), (0.0, 1.0))
    assert drop.keep_mask[:, 3, -1].all()
    assert not drop.keep_mask[:, :, :14].any()
    assert (drop.keep_indices.diff() > 0).all()


BAD = {
    "mask_ratio": {ValueError: [1.0, 1, 1.5, -0.1, math.nan, math.inf], TypeError: [True, "0.5", None]},
    "sigma": {ValueError: [0, 0.0, -0.2, math.nan, math.inf], TypeError: [True, "0.2", None]},
    "center": {ValueError: [(0, 1.1), (-2.0, 0), (math.nan, 0), 0.5, (0, 0, 0), "00", None]},
    "sampling": {ValueError: ["gumbel", "", None, 1]},
    "num_prefix_tokens": {ValueError: [-1], TypeError: [1.0, True, "1"]},
    "grid_size": {ValueError: [14, (14,), (1, 14, 14, 1), "77"]},
    "ordered": {TypeError: [1, "yes", None]},
}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [(name, value, error) for name, rows in BAD.items() for error, values in rows.items() for value in values],
    ids=str,
)
def test_bad_arguments_raise_when_given_and_when_set(name, value, error):
    """With a message that names the argument and shows the value; the old value stays."""
    with pytest.raises(error, match=f"^{name} must") as given:
        GaussianPatchDropout(**{"mask_ratio": 0.5, name: value})
    assert repr(value) in str(given.value)
    drop = GaussianPatchDropout(0.5)
    before = getattr(drop, name)
    with pytest.raises(error, match=f"^{name} must"):
        setattr(drop, name, value)
    assert getattr(drop, name) == before


@pytest.mark.parametrize(
    ("name", "value", "shown", "error"),
    [
        ("center", ("a", 0), "'a'", TypeError), ("center", (True, 0), "True", TypeError),
        ("grid_size", (0, 14), "0", ValueError), ("grid_size", (7.0, 10), "7.0", TypeError),
    ],
)  # fmt: skip
def test_bad_member_of_a_pair_is_named(name, value, shown, error):
    with pytest.raises(error, match=rf"^{name} .*got {shown}"):
        setattr(GaussianPatchDropout(0.5), name, value)


@every_drop
@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (2, 16), r"x must have shape .*\(2, 16\)"),
        ({}, (2, 4, 4, 1), r"x must have shape .*\(2, 4, 4, 1\)"),
        ({"num_prefix_tokens": 5}, (2, 5, 4), r"\(2, 5, 4\).*num_prefix_tokens=5"),
        ({"num_prefix_tokens": 6}, (2, 5, 4), r"\(2, 5, 4\).*num_prefix_tokens=6"),
        ({"grid_size": (3, 5)}, (2, 16, 4), "3 x 5 .*16 patches.*grid_size"),
    ],
)
def test_bad_tokens_raise(make, options, shape, message):
    with pytest.raises(ValueError, match=message):
        make(0.5, **options)(torch.zeros(shape))


@pytest.mark.parametrize("make", [DROPS["additive"], DROPS["weighted"]])
def test_a_rule_on_coordinates_says_so_where_there_is_no_grid(make):
    with pytest.raises(ValueError, match="pass grid_size"):
        make(0.5)(torch.zeros(2, 17, 4))


def test_a_sigma_in_pixels_or_degrees_warns():
    with pytest.warns(UserWarning, match=r"sigma=50 is the variance of a Gaussian on the square \[-1, 1\]\^2"):
        drop = GaussianPatchDropout(0.5, sigma=50)
    assert drop.sigma == 50
    with pytest.warns(UserWarning, match="no number of pixels or degrees"):
        drop.sigma = 20
    drop.sigma = 8.0


@every_drop
@pytest.mark.parametrize(
    ("name", "meant"),
    [("ratio", "mask_ratio"), ("p", "mask_ratio"), ("prob", "mask_ratio"), ("mask_raito", "mask_ratio"),
     ("order", "ordered"), ("grid", "grid_size"), ("colour", None),
     ("num_prefix_token", "num_prefix_tokens"), ("gridsize", "grid_size")],
)  # fmt: skip
def test_a_misspelled_attribute_raises_with_the_nearest_name(make, name, meant):
    """A name that can be meant for none is left alone: torch's tools put theirs on every module."""
    drop = make(0.5)
    if meant is None:
        setattr(drop, name, 0)
        return
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'.*did you mean '{meant}'"):
        setattr(drop, name, 0)
    drop.qconfig = drop._hf_hook = None
    assert drop.mask_ratio == 0.5


def test_a_subclass_may_hold_what_it_likes():
    drop = NearestPatches(0.5)
    drop.ratio = drop.p = 0.1
    assert drop.mask_ratio == 0.5
    with pytest.raises(AttributeError, match="it has no 'sigma' either"):
        RandomPatchDropout(0.5).std = 0.1


def test_images_and_tensors_get_a_way_out():
    with pytest.raises(ValueError, match=r"\(2, 3, 48, 48\)\. Images go into a model, which gaussmask\.attach"):
        RandomPatchDropout(0.5)(torch.zeros(2, 3, 48, 48))
    with pytest.raises(TypeError, match=r"mask_ratio must be a number.*pass value\.item\(\)"):
        RandomPatchDropout(torch.tensor(0.5))


def test_repr_tells_the_variance_and_the_true_standard_deviation():
    text = repr(GaussianPatchDropout(0.5, sigma=0.2, num_prefix_tokens=1, center=(0.1, 0.0)))
    assert all(part in text for part in ("mask_ratio=0.5", "sigma=0.2", "0.447", "variance", "additive", "(0.1, 0.0)"))


@every_drop
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_draw_knows_no_precision(make, dtype, autocast):
    """Other input dtypes, and bfloat16 autocast, keep the same sets as float32, and the dtype of the input."""
    drop, x = make(0.5, num_prefix_tokens=1), torch.randn(64, 1 + 196, 2)
    torch.manual_seed(0)
    drop(x)
    expected = drop.keep_mask
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = drop(x.to(dtype))
        assert drop.scores(torch.zeros(2, 4, 2)).dtype == torch.float32
    assert kept.dtype == dtype
    assert torch.equal(drop.keep_mask, expected)
    assert torch.equal(kept, rows(x.to(dtype), drop.keep_indices, 1))


@every_drop
def test_copies_carry_no_draw_and_the_state_dict_nothing(make):
    drop = make(0.75, num_prefix_tokens=1, grid_size=(2, 8), ordered=True)
    drop(torch.zeros(2, 17, 1))
    assert dict(drop.state_dict()) == {}
    assert not [*drop.parameters(), *drop.buffers()]
    for twin in (copy.deepcopy(drop), pickle.loads(pickle.dumps(drop))):
        assert twin.keep_indices is None
        assert twin.keep_mask is None
        assert repr(twin) == repr(drop)
        assert twin(torch.zeros(2, 17, 1)).shape == (2, 5, 1)
    assert drop.keep_indices is not None


@every_drop
def test_compiles_whole_and_follows_the_module(make):
    """Each call draws anew; eval and another ratio take effect; the same seed keeps the same sets as eager."""
    torch._dynamo.reset()
    drop, x = make(0.5, num_prefix_tokens=1), torch.randn(4, 1 + 64, 2)
    compiled = torch.compile(drop, fullgraph=True, backend="aot_eager")
    masks = []
    for _ in range(2):
        kept = compiled(x)
        assert torch.equal(kept, rows(x, drop.keep_indices, 1))
        masks.append(drop.keep_mask)
    assert not torch.equal(*masks)
    drop.mask_ratio = 0.75
    torch.manual_seed(0)
    assert compiled(x).shape == (4, 1 + 16, 2)
    mask = drop.keep_mask
    torch.manual_seed(0)
    drop(x)
    assert torch.equal(drop.keep_mask, mask)
    drop.eval()
    assert torch.equal(compiled(x), x)
    assert drop.keep_indices is None
    drop.train()
    assert compiled(x).shape == (4, 1 + 16, 2)


@every_drop
def test_gradient_is_one_where_kept_and_zero_where_dropped(make):
    x = torch.randn(3, 2 + 16, 4, requires_grad=True)
    drop = make(0.5, num_prefix_tokens=2)
    drop(x).sum().backward()
    expected = torch.cat([torch.ones(3, 2), drop.keep_mask.flatten(1).float()], dim=1)
    assert torch.equal(x.grad, expected[..., None].expand_as(x))
    assert not drop.keep_indices.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_masks_without_autograd_too(mode):
    drop, x = GaussianPatchDropout(0.5), torch.randn(2, 16, 4)
    with mode():
        kept = drop(x)
    assert not kept.requires_grad
    assert torch.equal(kept, rows(x, drop.keep_indices, 0))
    assert drop(x.requires_grad_()).requires_grad


@every_drop
def test_every_image_and_every_call_draws_its_own(make):
    drop = make(0.5)
    x = torch.zeros(2, 196, 1)
    drop(x)
    first = drop.keep_mask
    assert not torch.equal(*first)
    drop(x)
    assert not torch.equal(drop.keep_mask, first)


@every_drop
def test_empty_batch(make):
    drop = make(0.5, num_prefix_tokens=1)
    assert drop(torch.zeros(0, 17, 4)).shape == (0, 9, 4)
    assert drop.keep_indices.shape == (0, 8)
    assert drop.keep_mask.shape == (0, 4, 4)


@every_drop
def test_module_draws_by_keep_probability(make):
    """8,000 images: within 5 standard errors and 1e-3. An off-centre Gaussian tells rows from columns."""
    options = {} if make is RandomPatchDropout else {"center": (0.5, -0.2)}
    drop = make(0.7, grid_size=(4, 9), **options)
    torch.manual_seed(0)
    drop(torch.zeros(8000, 36, 1))
    if options:
        options |= {"sigma": drop.sigma, "sampling": drop.sampling}
    chance = keep_probability((4, 9), 0.7, **options)
    assert ((drop.keep_mask.float().mean(0) - chance).abs() <= 5 * (chance * (1 - chance) / 8000).sqrt() + 1e-3).all()


@pytest.mark.filterwarnings("ignore:sigma=1e.06 is the variance")
@pytest.mark.parametrize("sampling", ["additive", "weighted"])
def test_wide_gaussian_is_random_patch_dropout(sampling):
    """The same seed gives frequencies within 5 standard errors of the uniform ones."""
    drop = GaussianPatchDropout(0.75, sigma=1e6, sampling=sampling)
    torch.manual_seed(0)
    drop(torch.zeros(8000, 64, 1))
    frequency = drop.keep_mask.float().mean(0)
    assert ((frequency - 0.25).abs() <= 5 * math.sqrt(0.25 * 0.75 / 8000)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subclass_says_only_its_scores(dtype):
    """It sees float32 (y, x) centres, expanded and not copied, and its highest scores are kept."""
    drop = NearestPatches(0.8, num_prefix_tokens=1, grid_size=(5, 8), ordered=True)
    x = torch.randn(3, 1 + 40, 2).to(dtype)
    kept = drop(x)
    y, x_ = (grid.ravel() for grid in np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 1, 8), indexing="ij"))
    np.testing.assert_allclose(drop.seen, np.stack([y, x_], axis=-1)[None].repeat(3, axis=0), atol=1e-6)
    assert (drop.seen.dtype, drop.seen.stride(0)) == (torch.float32, 0)
    nearest = np.sort(np.argsort((y - 0.31) ** 2 + (x_ + 0.23) ** 2)[:8])
    assert drop.keep_indices.tolist() == [nearest.tolist()] * 3
    assert torch.equal(kept, rows(x, drop.keep_indices, 1))


def test_patches_on_an_axis_of_one_lie_at_zero():
    drop = NearestPatches(0.5, grid_size=(1, 4))
    drop(torch.zeros(1, 4, 1))
    assert (drop.seen[..., 0] == 0).all()


@pytest.mark.parametrize("shape", [(1, 16), (2, 1), (2, 17), (2, 16, 1), (16,)])
def test_scores_of_another_shape_raise(shape):
    drop = Scores(0.5)
    drop.given = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"Scores\.scores must return .*\(2, 16\), got"):
        drop(torch.zeros(2, 16, 4))


@pytest.mark.parametrize(
    ("given", "got"), [(None, "NoneType"), ([[0.0] * 16] * 2, "list"), (torch.zeros(2, 16) > 0, r"torch\.bool")]
)
def test_scores_that_are_no_numbers_raise(given, got):
    drop = Scores(0.5)
    drop.given = given
    with pytest.raises(TypeError, match=rf"Scores\.scores must return a tensor of numbers, got {got}"):
        drop(torch.zeros(2, 16, 4))


def test_base_class_asks_for_scores():
    with pytest.raises(NotImplementedError, match=r"PatchDropout must define scores\(coords"):
        PatchDropout(0.5)(torch.zeros(2, 16, 4))


def test_images_may_have_grids_of_their_own():
    drop = NearestPatches(0.75)
    coords = torch.rand(3, 12, 2) * 2 - 1
    keep_indices = drop.draw(3, 12, None, coords)
    distance = (coords - torch.tensor([0.31, -0.23])).norm(dim=-1)
    assert torch.equal(keep_indices.sort(1).values, distance.argsort(1)[:, :3].sort(1).values)
    assert drop.keep_mask.shape == (3, 12)
    assert torch.equal(drop.keep_mask.nonzero()[:, 1].view(3, 3), keep_indices.sort(1).values)


@pytest.mark.parametrize("sampling", ["additive", "weighted"])
def test_gaussian_follows_the_grid_of_each_image(sampling):
    """A Gaussian so narrow that the corner at its mean is certain: first in one image, last in the other."""
    corner_first = torch.cartesian_prod(torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 4))
    drop = GaussianPatchDropout(0.99, sigma=0.01, center=(-1, -1), sampling=sampling)
    coords = torch.stack([corner_first, corner_first.flip(0)])
    assert drop.draw(2, 16, None, coords).tolist() == [[0], [15]]


@every_drop
def test_padding_is_kept_only_for_want_of_real_patches(make):
    """K follows the padded N; coords of padding are arbitrary, here at the very centre."""
    torch.manual_seed(0)
    num_real = torch.tensor([12, 9, 6, 4, 0]).repeat(200)
    valid = torch.arange(12) < num_real[:, None]
    coords = torch.where(valid[..., None], torch.rand(1000, 12, 2) * 2 - 1, 0.0)
    drop = make(0.5)
    keep_indices = drop.draw(1000, 12, None, coords, valid)
    assert keep_indices.shape == (1000, 6)
    assert (drop.keep_mask.sum(1) == 6).all()
    assert torch.equal((drop.keep_mask & valid).sum(1), num_real.clamp(max=6))


@pytest.mark.parametrize("rows", [3, 17])
def test_coords_of_another_count_than_the_patches_are_refused(rows):
    with pytest.raises(ValueError, match=r"coords must have shape \(2, 16, 2\)"):
        RandomPatchDropout(0.5).draw(2, 16, None, torch.zeros(2, rows, 2))


@pytest.mark.parametrize("x", ["tokens", None, [[1.0]]])
def test_tokens_that_are_no_tensor_are_named(x):
    with pytest.raises(TypeError, match=f"x must be a tensor of tokens, got {type(x).__name__}"):
        RandomPatchDropout(0.5)(x)


class Operations(TorchDispatchMode):
    """Records the names of all operations, and the floating dtypes that they return."""

    def __init__(self):
        super().__init__()
        self.names, self.dtypes = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            self.dtypes.add(output.dtype)
        return output


@every_drop
def test_the_hot_path_gathers_once_and_never_sorts_waits_or_doubles(make):
    """One index_select for prefix and kept rows, one draw, one top-k, and no look at a value: a GPU would wait."""
    drop = make(0.75, num_prefix_tokens=1)
    x = torch.randn(3, 1 + 196, 8, requires_grad=True)
    with Operations() as forward:
        kept = drop(x)
    assert [forward.names.count(name) for name in ("index_select", "rand", "topk")] == [1, 1, 1]
    forbidden = (
        "sort",
        "argsort",
        "gather",
        "index",
        "nonzero",
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "_to_copy",
    )
    assert not set(forward.names) & set(forbidden)
    assert forward.dtypes == {torch.float32}
    with Operations() as backward:
        kept.sum().backward()
    assert backward.names.count("index_add") + backward.names.count("index_add_") == 1
    assert not set(backward.names) & {"scatter", "scatter_add", "sort", "index_put"}
