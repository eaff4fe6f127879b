"""The position oracle: a model that drops patches must compute for the kept tokens what the full model computes for
them when nothing attends to the dropped ones. It holds only if every kept token still carries its own position, be it
absolute, factorised or rotary, and if the prefix tokens are left alone.
"""

import contextlib
import copy
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import gaussmask

TOLERANCE = 2e-5


@contextlib.contextmanager
def masked_keys(keep, layouts):
    """Every attention over all patches, with (front, back) tokens around them, is blind to those not in `keep`."""
    padded = [F.pad(keep, layout, value=True) for layout in layouts]
    blind = {
        tokens.shape[1]: torch.zeros_like(tokens, dtype=torch.float32).masked_fill(~tokens, -torch.inf)
        for tokens in padded
    }
    sdpa, mha, softmax = F.scaled_dot_product_attention, F.multi_head_attention_forward, torch.Tensor.softmax

    def masked_sdpa(query, key, value, attn_mask=None, *args, **kwargs):
        if key.shape[-2] in blind:
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
            bias = blind[key.shape[-2]][:, None, None, :].to(query.dtype)
            attn_mask = bias if attn_mask is None else attn_mask + bias
        return sdpa(query, key, value, attn_mask, *args, **kwargs)

    def masked_mha(query, key, value, *args, **kwargs):
        if key.shape[0] in blind:
            assert kwargs.get("key_padding_mask") is None
            kwargs["key_padding_mask"] = blind[key.shape[0]].to(query.dtype)
        return mha(query, key, value, *args, **kwargs)

    def masked_softmax(scores, dim, **kwargs):  # attention written out, with an axis for the heads or without
        if scores.shape[-1] in blind and scores.ndim > 2:
            bias = blind[scores.shape[-1]].to(scores.dtype)
            if scores.ndim == 4:
                scores = scores + bias[:, None, None, :]
            else:
                scores = scores + bias.repeat_interleave(len(scores) // len(bias), 0)[:, None, :]
        return softmax(scores, dim, **kwargs)

    with (
        mock.patch.object(torch.Tensor, "softmax", masked_softmax),
        mock.patch.object(F, "scaled_dot_product_attention", masked_sdpa),
        mock.patch.object(F, "multi_head_attention_forward", masked_mha),
    ):
        yield


def run(host, model, inputs, batch_size):
    """The hidden states behind the last block, and the pooled ones where they are made of comparable tokens."""
    hidden = []

    def record(module, args, output):
        tokens = output if isinstance(output, Tensor) else output[0]
        hidden.append(tokens[-1] if tokens.ndim == 4 else tokens)  # of the last layer, where all are stacked

    handle = host.find_hidden(model).register_forward_hook(record)
    output = model(**inputs)
    handle.remove()
    (tokens,) = hidden
    if host.packed:
        tokens = tokens.view(batch_size, -1, tokens.shape[-1])
    return tokens, host.pooled(output) if host.pooled else None


def randomise(model):
    """Position tables, biases and layer scales start at 0 or close to it, where an error would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
            if name.endswith("proj_w.bias"):  # Cait's attention gives weight to masked keys too
                parameter.zero_()


def difference(result, expected):
    assert result.shape == expected.shape
    return ((result - expected).abs().max() / expected.abs().max()).item()


# Batch size, ratio, drop; among them a square number kept (9 of 36), and fewer dropped than there are prefix tokens.
DROPS = {
    "half": (3, 0.5, gaussmask.RandomPatchDropout),
    "three-quarters": (2, 0.75, partial(gaussmask.GaussianPatchDropout, sigma=1.0)),
    "most": (1, 0.918, partial(gaussmask.GaussianPatchDropout, sampling="weighted")),
    "two patches": (2, 0.05, gaussmask.RandomPatchDropout),
}


class Answer(NamedTuple):
    """Relative differences of the hidden states of the kept tokens, and of the pooled ones.

    Args:
        hidden, pooled: from the full model with masked keys; `pooled` is None where other tokens are averaged.
        control, pooled_control: from the full model without masks, which must differ.
        drop: the drop after the forward.
    """

    hidden: float
    pooled: float | None
    control: float
    pooled_control: float | None
    drop: gaussmask.PatchDropout


def ask(host, share, move=lambda value: value):
    """Put one host and one of `DROPS` to the oracle, with the model and its inputs moved to a device or a dtype."""
    torch.manual_seed(1)
    num_patches = host.count
    batch_size, mask_ratio, make_drop = DROPS[share]
    drop = make_drop(mask_ratio)
    model = host.build()
    randomise(model)
    model = move(model)
    full = copy.deepcopy(model).eval()  # all dropouts are 0, but for patch dropout of the host's own
    inputs = move(host.inputs(batch_size))

    gaussmask.attach(model, drop)
    hidden, pooled = run(host, model, inputs, batch_size)
    keep_indices = drop.keep_indices
    keep = keep_indices.new_zeros(batch_size, num_patches, dtype=torch.bool).scatter_(1, keep_indices, True)
    always = torch.arange(host.prefix + num_patches + host.suffix, device=keep.device).expand(batch_size, -1)
    parts = [always[:, : host.prefix], host.prefix + keep_indices, always[:, host.prefix + num_patches :]]
    rows = torch.cat(parts, dim=1).unsqueeze(-1)
    with masked_keys(keep.view(1, -1) if host.packed else keep, [(0, 0), (host.prefix, host.suffix), *host.layouts]):
        expected, expected_pooled = run(host, full, inputs, batch_size)
    unmasked, unmasked_pooled = run(host, full, inputs, batch_size)
    return Answer(
        difference(hidden, expected.take_along_dim(rows, 1)),
        None if pooled is None else difference(pooled, expected_pooled),
        difference(hidden, unmasked.take_along_dim(rows, 1)),
        None if pooled is None else difference(pooled, unmasked_pooled),
        drop,
    )
