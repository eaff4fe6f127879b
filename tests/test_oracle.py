"""Every host before the position oracle (oracle.py)."""

import pytest
import torch
from hosts import ALL
from oracle import DROPS, TOLERANCE, ask


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("share", DROPS)
def test_kept_tokens_are_those_of_the_full_model(name, share):
    host, (batch_size, mask_ratio, _) = ALL[name], DROPS[share]
    answer = ask(host, share)
    keep_indices = answer.drop.keep_indices
    assert keep_indices.shape == (batch_size, int(host.count * (1 - mask_ratio)))
    assert answer.drop.keep_mask.shape[1:] == (host.grid or (host.count,))
    if share == "half":
        assert (keep_indices.diff() < 0).any(), "an order would hide a table that is cut and not gathered"
        assert not torch.equal(*keep_indices[:2].sort().values), "each image has a draw of its own"
    assert answer.hidden < TOLERANCE
    assert answer.control > 3e-3
    if answer.pooled is not None:
        assert answer.pooled < TOLERANCE
        assert answer.pooled_control > 1e-3
