import pytest
import torch
from tiny_models import FAMILY_CONFIGS, compress, tiny, tokens
from transformers import AutoModelForCausalLM

import gateskip_compress as g
from gateskip_compress.model import blocks
from gateskip_compress.pruning.influence import influence


def test_influence_of_turned_and_unturned_streams():
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 2.0]])
    after = torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    torch.testing.assert_close(influence(before, after), torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_a_pruned_model_is_plain_and_loads_without_us(family, tmp_path):
    model = compress(tiny(family), g.Prune(blocks=1))
    assert len(blocks(model)) == model.config.num_hidden_layers == 3
    model.save_pretrained(tmp_path / "x")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert "quantization_config" not in again.config.to_dict()
    ids = tokens(1, 24)
    assert torch.equal(again(ids).logits, model(ids).logits)
    out = model.generate(ids, max_new_tokens=4, do_sample=False)  # the cache is indexed by the new places
    assert torch.equal(out, again.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))


def test_a_block_that_does_nothing_goes_first():
    model = tiny()
    for part in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        part.weight.data.zero_()
    before = model(tokens(1, 16)).logits
    compress(model, g.Prune(blocks=1))
    assert model.gateskip.steps[0]["record"]["removed"][0]["block"] == 2
    assert torch.equal(model(tokens(1, 16)).logits, before)


def test_nothing_is_cut_at_0():
    ids = tokens(1, 16)
    assert torch.equal(compress(tiny(), g.Prune(blocks=0))(ids).logits, tiny()(ids).logits)


def test_cutting_everything_is_refused():
    with pytest.raises(ValueError, match="cannot drop 4 of 4 blocks; at most 3"):
        compress(tiny(), g.Prune(blocks=4))
