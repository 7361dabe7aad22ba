import pytest
import torch
from tiny_models import FAMILY_CONFIGS, tiny, tokens

from gateskip_compress.macs import count_macs, counted_macs, ungated_macs_per_token


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shapes_and_running_agree(family, attention):
    model = tiny(family)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers has no sdpa here")
    model.set_attn_implementation(attention)
    ids = tokens(2, 32)
    assert count_macs(model, ids) == 64 * ungated_macs_per_token(model, 32)


def test_a_product_with_nothing_to_sum_is_not_counted():
    """Some versions of transformers find rotary angles so."""
    with counted_macs() as macs:
        torch.ones(2, 3, 1) @ torch.ones(2, 1, 4)
        assert macs() == 0
        torch.ones(2, 3, 5) @ torch.ones(2, 5, 4)
        assert macs() == 2 * 3 * 5 * 4


def test_a_hand_counted_model():
    model = tiny()
    projections = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    assert ungated_macs_per_token(model, 10) == 4 * (projections + 2 * 10 * 64) + 64 * 96
