import pytest
from tiny_models import FAMILY_CONFIGS, tiny, tokens

from gateskip_compress.macs import count_macs, ungated_macs_per_token


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shapes_and_running_agree(family, attention):
    model = tiny(family)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers has no sdpa here")
    model.set_attn_implementation(attention)
    ids = tokens(2, 32)
    rotary = 2 * 32 * 8 * 2  # the tables' own products, at most two tables
    assert count_macs(model, ids) == pytest.approx(64 * ungated_macs_per_token(model, 32), abs=rotary)


def test_a_hand_counted_model():
    model = tiny()
    projections = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    assert ungated_macs_per_token(model, 10) == 4 * (projections + 2 * 10 * 64) + 64 * 96
