import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from tiny_models import CALIBRATION, DEVICE, FAMILY_CONFIGS, compress, tiny, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM

import gateskip_compress as g
from gateskip_compress.elimination import eliminate
from gateskip_compress.macs import count_macs, head_macs, ungated_macs_per_token
from gateskip_compress.model import Width, blocks, branch_width, branches, narrow, out_projection, watch
from gateskip_compress.pipeline import apply, start
from gateskip_compress.pruning.cut import Curve, sizes, uneven, uniform
from gateskip_compress.pruning.influence import influence
from gateskip_compress.pruning.moments import RIDGE, damped, fixed_scale, length_before, refitted, weighed
from gateskip_compress.pruning.perplexity import Tries, log_perplexity
from gateskip_compress.pruning.refit import narrow_and_refit
from gateskip_compress.pruning.score import cached_scores, score
from gateskip_compress.pruning.trial import corrected, trial
from gateskip_compress.quality import evaluate
from gateskip_compress.step import Context
from gateskip_compress.text import Passage

NARROWED = [name for name in FAMILY_CONFIGS if not name.startswith(("gpt", "opt"))]


def test_influence_of_turned_and_unturned_streams():
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 2.0]])
    after = torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    torch.testing.assert_close(influence(before, after), torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_a_pruned_model_is_plain_and_loads_without_us(family, tmp_path):
    model = compress(tiny(family), g.Prune(blocks=1))
    assert len(blocks(model)) == model.config.num_hidden_layers == 3
    model.save_pretrained(tmp_path / "x")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "x").to(DEVICE)
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


def block_parameters(model):
    return sum(p.numel() for block in blocks(model) for p in block.parameters())


# --- numerics ---


def lost_by_hand(x, weight, metric, kept):
    """Mean |C (W x - W' x')|² of the best W' over the kept inputs."""
    y = x @ weight.T
    best = torch.linalg.lstsq(x[:, kept], y).solution
    return ((y - x[:, kept] @ best) @ metric.T).square().sum(1).mean().item()


@pytest.mark.parametrize("group", [1, 3])
def test_elimination_loses_what_a_refit_by_hand_loses(group):
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(300, 12, generator=generator, dtype=torch.float64)
        @ torch.randn(12, 12, generator=generator).double()
    )
    weight, metric = (torch.randn(5, n, generator=generator).double() for n in (12, 5))
    gone = eliminate(x.T @ x / len(x), metric @ weight, group=group, share=0.01)
    assert sorted(gone.order.tolist()) == list(range(12 // group))
    for count in range(1, 12 // group):
        out = {unit * group + i for unit in gone.order[:count].tolist() for i in range(group)}
        expected = lost_by_hand(x, weight, metric, [i for i in range(12) if i not in out])
        assert gone.lost[count - 1].item() == pytest.approx(expected, rel=1e-4)
    first = [
        lost_by_hand(x, weight, metric, [i for i in range(12) if i // group != unit]) for unit in range(12 // group)
    ]
    assert gone.order[0] == first.index(min(first))


CURVES = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=3)


@limits(max_examples=50, deadline=None)
@given(CURVES, st.floats(0.05, 0.95))
def test_an_uneven_cut_reaches_its_target_and_no_step_of_it_is_needless(rises, share):
    scores, costs, allowed = {}, {}, {}
    for layer, rise in enumerate(rises):
        lost = torch.tensor(rise, dtype=torch.float64).cumsum(0).tolist()
        scores[layer, "mlp"] = Curve(tuple(range(len(rise))), tuple(lost))
        allowed[layer, "mlp"] = list(range(len(rise) + 1))
        costs[layer, "mlp"] = 1 / (len(rise) * len(rises))
    gone = uneven(scores, costs, share, allowed)
    saved = sum(costs[key] * count for key, count in gone.items())
    assert saved >= share - 1e-9
    assert all(saved - costs[key] < share for key, count in gone.items() if count)


def test_convex_curves_are_cut_at_their_least_loss():
    lost = {0: (1.0, 3.0, 6.0), 1: (0.5, 2.5, 7.0), 2: (2.0, 4.5, 9.0)}
    scores = {(layer, "mlp"): Curve((2, 0, 1), curve) for layer, curve in lost.items()}
    costs = dict.fromkeys(scores, 1 / 9)
    for steps in range(1, 9):
        gone = uneven(scores, costs, steps / 9 - 1e-9, {key: [0, 1, 2, 3] for key in scores})
        found = sum(scores[key].after(count) for key, count in gone.items())
        every = [c for c in product(range(4), repeat=3) if sum(c) >= steps]
        assert found == min(sum(scores[i, "mlp"].after(n) for i, n in enumerate(counts)) for counts in every)
    assert scores[0, "mlp"].left(1) == [0, 1]


def test_a_uniform_cut_takes_the_pair_that_loses_least_among_those_that_fit():
    scores = {
        (layer, kind): Curve(tuple(range(4)), lost)
        for layer in range(2)
        for kind, lost in (("attention", (5.0, 6.0, 7.0, 8.0)), ("mlp", (1.0, 2.0, 9.0, 20.0)))
    }
    costs, allowed = dict.fromkeys(scores, 1 / 16), {key: [0, 1, 2, 3] for key in scores}
    assert uniform(scores, costs, 0.25, allowed, lambda _: True)[0, "mlp"] == 2
    gone = uniform(scores, costs, 0.25, allowed, lambda gone: gone["mlp"] < 2)
    assert gone == {(0, "attention"): 1, (1, "attention"): 1, (0, "mlp"): 1, (1, "mlp"): 1}
    with pytest.raises(ValueError, match=r"share 0\.9 is out of reach: the nearest that can go is 0\.75"):
        uniform(scores, costs, 0.9, allowed, lambda _: True)


def test_what_is_left_is_a_multiple_or_all_or_nothing():
    assert sizes(Width(100, 1), 32, 0) == [0, 4, 36, 68, 100]
    assert sizes(Width(4, 32), 64, 1) == [0, 2]


def test_behind_a_norm_of_fixed_scale_errors_and_gradients_are_those_of_the_stream():
    generator = torch.Generator().manual_seed(0)
    y, stream = (torch.randn(5, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    y = (y * torch.tensor([[1e-3], [0.1], [1.0], [30.0], [1e4]])).requires_grad_()
    gain = torch.rand(8, dtype=torch.float64, generator=generator) + 0.5

    def gradients(scale):
        z = y * scale * gain
        return torch.autograd.grad((z @ gain + z.square().sum(-1)).sum(), [y, z])

    scale = y.square().mean(-1, keepdim=True).rsqrt()
    z = (y * scale * gain).detach()
    at_y, at_z = gradients(scale)
    assert (at_y * y).sum(-1).abs().max() < 1e-9
    expected, _ = gradients(scale.detach())
    torch.testing.assert_close(fixed_scale(at_y, y.detach(), at_z, z), expected)
    assert torch.equal(fixed_scale(at_z, z, at_z, z), at_z)
    found = z.norm(dim=1) / y.norm(dim=1) / (stream + z).norm(dim=1)
    torch.testing.assert_close(1 / length_before(stream + z, y, z)[:, 0].double(), found, atol=0, rtol=1e-5)
    assert torch.equal(length_before(stream.float(), z.float(), z.float())[:, 0], stream.float().norm(dim=1))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "olmo2"])
def test_a_whole_branch_loses_what_it_adds_to_the_stream_times_the_gradient_there(family, monkeypatch):
    monkeypatch.setattr("gateskip_compress.pruning.score.corrected", lambda curves, _tried: curves)
    said, count = score(tiny(family), "second_order", Context(CALIBRATION)), CALIBRATION.numel()
    for layer, branch in product((0, 3), branches(tiny(family))):
        model, held, xs, gs = tiny(family).requires_grad_(False), {}, [], []
        out = out_projection(model, layer, branch.kind)
        if branch.post:
            norm = getattr(blocks(model)[layer], branch.post)
            norm.forward = lambda y, whole=norm.forward: y * (whole(y) / y).detach()  # its scale has no gradient

        def keep(_module, args, y, held=held):
            held["x"], held["y"] = args[0][0].detach(), y.requires_grad_()
            y.retain_grad()

        def keep_stream(*at, held=held, key=(layer, branch.kind)):
            if at[:2] == key:
                held["z"], held["stream"] = at[3][0].detach(), (at[3] + at[4])[0].detach()

        out.register_forward_hook(keep)
        with watch(model, keep_stream):
            for window in CALIBRATION:
                logits = model(window[None], use_cache=False).logits[0, :-1]
                torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").backward()
                y, z, stream = (held[name].detach().norm(dim=-1).view(-1, 1) for name in ("y", "z", "stream"))
                xs.append(weighed(held["x"], stream * y / z).double())
                gs.append((held["y"].grad[0] * stream * y / z)[1:].double())
        xx, gg = (torch.cat(rows).T @ torch.cat(rows) / count for rows in (xs, gs))
        weight = out.weight.double()
        whole = float((gg @ weight @ damped(xx, count) * weight).sum()) / 2
        assert said[layer, branch.kind].lost[-1] == pytest.approx(whole, rel=1e-3)


def test_a_branch_whose_length_its_norm_restores_is_missed_all_the_same():
    model = tiny("gemma3_text")
    out = model.model.layers[1].self_attn.o_proj.weight
    out.data = out[:, :1] * out[:1]  # behind the norm, the same everywhere but for its sign
    model.model.layers[1].post_attention_layernorm.weight.data += 3
    said = score(model, "second_order", Context(CALIBRATION))[1, "attention"].lost[-1]
    lost = score(model, "perplexity", Context(CALIBRATION))[1, "attention"].lost[-1]
    assert said > lost / 4 > 0.05


# --- surgery ---


def masked_logits(model, kept, ids):
    """What is cut adds nothing: the columns of output projections are zero."""
    for (layer, kind), units in kept.items():
        block, width = blocks(model)[layer], branch_width(model, layer, kind)
        out = block.self_attn.o_proj if kind == "attention" else block.mlp.down_proj
        columns = [
            unit * width.inputs + i for unit in range(width.units) for i in range(width.inputs) if unit not in units
        ]
        out.weight.data[:, columns] = 0
    return model(ids).logits


KEPT = {(0, "attention"): [1], (1, "mlp"): [0, 5, 77], (2, "attention"): [], (3, "mlp"): [], (3, "attention"): [0]}


@pytest.mark.parametrize("family", NARROWED)
def test_a_narrow_branch_is_the_wide_one_with_the_rest_silent(family):
    kept = {key: units for key, units in KEPT.items() if key[1] == "mlp" or family != "olmo2"}
    if family.startswith("phi3"):  # its attention asks the config for its heads
        kept |= {(0, "attention"): [], (3, "attention"): [0, 1]}
    ids = tokens(2, 24)
    expected = masked_logits(tiny(family), kept, ids)
    model = tiny(family)
    for (layer, kind), units in kept.items():
        narrow(model, layer, kind, units)
    torch.testing.assert_close(model(ids).logits, expected, atol=2e-4, rtol=1e-4)
    settings = dict(max_new_tokens=6, do_sample=False)
    cached = model.generate(ids[:1], **settings)
    assert torch.equal(cached, model.generate(ids[:1], use_cache=False, **settings))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_refit_is_the_least_squares_solution_to_the_whole_branch(family):
    kept, windows = list(range(0, 128, 2)), CALIBRATION[:4]
    model = tiny(family)
    block, seen, added = model.model.layers[0], [], []
    last = block.post_feedforward_layernorm if family == "gemma3_text" else block.mlp
    handles = [
        block.mlp.down_proj.register_forward_hook(lambda _m, args, y: seen.append((args[0][0], y[0]))),
        last.register_forward_hook(lambda _m, _args, z: added.append(z[0])),
    ]
    with torch.no_grad():
        after = [model(window[None], output_hidden_states=True).hidden_states[1][0] for window in windows]
    for handle in handles:
        handle.remove()
    rows, whole = [], block.mlp.down_proj.weight.detach().double()
    for (x, y), z, stream in zip(seen, added, after, strict=True):
        weight = torch.ones(48, device=DEVICE)
        weight[0] = 48**0.5
        rows.append((weight / stream.norm(dim=1) * z.norm(dim=1) / y.norm(dim=1))[:, None] * x)
    rows = torch.cat(rows).double()
    square = rows.square().sum(0)
    fake = torch.diag(
        (min(1, RIDGE * 128 / 192) * square + 1e-4 * square.mean()).sqrt()
    )  # as rows in which one input is there alone
    rows = torch.cat((rows, fake))
    expected = torch.linalg.lstsq(rows[:, kept], rows @ whole.T).solution
    narrow_and_refit(model, {(0, "mlp"): kept}, Context(windows))
    torch.testing.assert_close(block.mlp.down_proj.weight.double(), expected.T, atol=1e-4, rtol=1e-3)


# --- the step ---

UNIFORM, UNEVEN = dict(share=0.2, multiple=16), dict(share=0.2, multiple=16, shape="uneven")


@pytest.mark.parametrize("family", [name for name in NARROWED if name != "olmo2"])
def test_a_uniform_cut_is_plain_and_an_uneven_one_loads_through_us(family, tmp_path):
    ids = tokens(2, 24)
    for name, settings in (("uniform", UNIFORM), ("uneven", UNEVEN)):
        if family.startswith("phi3"):
            settings = {**settings, "cut": "channels"}
        model = compress(tiny(family), g.Prune(**settings))
        assert block_parameters(model) <= 0.8 * block_parameters(tiny(family))
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert ("quantization_config" in config) == (name == "uneven")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name).to(DEVICE)
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_plain_transformers_alone_loads_a_uniform_cut_with_equal_logits(tmp_path):
    model = compress(tiny(), g.Prune(**UNIFORM))
    model.save_pretrained(tmp_path / "x")
    torch.save((tokens(2, 24), model(tokens(2, 24)).logits), tmp_path / "logits.pt")
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        f"ids, logits = torch.load({str(tmp_path / 'logits.pt')!r})\n"
        f"torch.set_num_threads(1); model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'x')!r})\n"
        "model.eval().to(ids.device)\n"
        "assert torch.equal(model(ids).logits, logits); assert 'gateskip_compress' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("of", ["parameters", "macs", "bytes"])
def test_at_least_the_share_goes_and_hardly_more(of):
    model = compress(tiny(), g.Prune(share=0.3, shape="uneven", multiple=8, of=of))
    if of == "macs":
        before, after = (ungated_macs_per_token(m, 48) - head_macs(m) for m in (tiny(), model))
    else:
        before, after = block_parameters(tiny()), block_parameters(model)
    assert 0.6 < after / before <= 0.7 + 1e-3  # norms are not cut
    assert count_macs(model, tokens(1, 48)) == 48 * ungated_macs_per_token(model, 48)


@pytest.mark.parametrize("by", ["influence", "second_order"])
def test_a_branch_that_does_nothing_goes_first(by):
    model = tiny()
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    before = model(tokens(1, 16)).logits
    compress(model, g.Prune(share=0.02, cut="branches", by=by))
    assert model.gateskip.steps[0]["record"]["widths"] == [[2, 128], [0, 128], [2, 128], [2, 128]]
    torch.testing.assert_close(model(tokens(1, 16)).logits, before, atol=1e-4, rtol=1e-4)


def test_branches_by_perplexity_are_those_it_is_best_without():
    windows = [Passage.whole(ids) for ids in CALIBRATION]
    found = score(tiny(), "perplexity", Context(CALIBRATION))
    model = tiny()
    whole = math.log(evaluate(model, windows).perplexity)
    model.model.layers[2].self_attn.o_proj.weight.data.zero_()
    without = math.log(evaluate(model, windows).perplexity)
    assert found[2, "attention"].after(2) == pytest.approx(without - whole, abs=1e-4)


@pytest.mark.parametrize(("family", "kv"), [("llama", "copy"), ("gemma3_text", "dense"), ("phi3", "dense")])
def test_a_try_is_a_whole_pass_of_the_changed_model(family, kv):
    model = compress(tiny(family), g.GateSkip(budget=0.7, rank=4, kv=kv))
    tries, windows = Tries(model, CALIBRATION), CALIBRATION
    assert tries.whole == log_perplexity(model, windows)
    found = []
    for layer, block in enumerate(blocks(model)):
        changed = out_projection(model, layer, "mlp").weight.data
        kept = changed.clone()
        changed *= -1
        found.append(tries.changed(layer))
        assert found[-1] == log_perplexity(model, windows)
        changed.copy_(kept)
        without = tries.without_block(layer)
        handle = block.register_forward_hook(lambda _m, args, _out: args[0])
        assert without == log_perplexity(model, windows)
        handle.remove()
        found.append(without)
    assert len({*found, tries.whole}) == len(found) + 1
    assert tries.changed(0) == tries.whole


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_a_trial_measures_the_cut_model_and_leaves_the_whole_one(kind):
    model, cut = tiny(), tiny()
    out, width = out_projection(model, 1, kind), branch_width(model, 1, kind)
    curve = Curve(tuple(reversed(range(width.units))), (0.0,) * width.units)
    x = torch.randn(500, width.units * width.inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments, before = damped(x.T @ x, len(x)), out.weight.data.clone()
    gone, measured = trial(out, curve, width, moments, lambda: log_perplexity(model, CALIBRATION))
    assert torch.equal(out.weight.data, before)
    assert gone == max(1, width.units // 3)
    left = range(width.units - gone)
    narrow(cut, 1, kind, left)
    out_projection(cut, 1, kind).weight.data.copy_(refitted(moments, before, torch.arange(len(left) * width.inputs)))
    assert measured == pytest.approx(log_perplexity(cut, CALIBRATION), abs=1e-5)
    assert measured != pytest.approx(log_perplexity(model, CALIBRATION), abs=1e-5)


def test_curves_are_corrected_by_the_trials_of_neighbouring_blocks():
    curves = {
        (layer, kind): Curve((1, 0), (said, 3 * said))
        for layer in range(8)
        for kind, said in (("attention", 0.1 + layer), ("mlp", 2.0))
        if (layer, kind) != (3, "mlp")
    }
    tried = {key: (1, 0.5 * key[0] ** 2 - 1) for key in curves}
    found = corrected(curves, tried)
    for layer, kind in curves:
        said = lost = 0.0
        for near in range(max(0, layer - 2), min(8, layer + 3)):
            for other in ("attention", "mlp"):
                if (near, other) in curves:
                    said += curves[near, other].lost[0]
                    lost += tried[near, other][1]
        expected = [max(0.02, lost / said) * value for value in curves[layer, kind].lost]
        assert found[layer, kind].lost == pytest.approx(expected)
        assert found[layer, kind].order == (1, 0)
    nothing = {(0, "mlp"): Curve((0,), (0.0,))}
    assert corrected(nothing, {(0, "mlp"): (1, 0.3)}) == nothing


@pytest.mark.parametrize("by", ["second_order", "activation", "magnitude"])
def test_units_that_do_nothing_go_first(by):
    model = tiny()
    for block in model.model.layers:
        for weight in (block.mlp.gate_proj.weight, block.mlp.up_proj.weight, block.mlp.down_proj.weight.T):
            weight.data[32:64] = 0
    before = model(tokens(1, 16)).logits
    compress(model, g.Prune(share=0.15, cut="channels", by=by, multiple=32))
    assert model.config.intermediate_size == 96
    torch.testing.assert_close(model(tokens(1, 16)).logits, before, atol=1e-4, rtol=1e-4)


def test_curvature_and_refit_beat_magnitude_and_dropping_blocks():
    held_out = [Passage.whole(ids) for ids in tokens(8, 48, seed=5)]
    kl = {}
    for name, step in (
        ("refit", g.Prune(**UNEVEN)),
        ("magnitude", g.Prune(**UNIFORM, by="magnitude")),
        ("blocks", g.Prune(blocks=1)),
    ):
        kl[name] = evaluate(compress(tiny(), step), held_out, tiny()).kl_nats
    assert kl["refit"] < min(kl["magnitude"], kl["blocks"])


def test_another_target_cuts_by_the_same_scores(tmp_path, monkeypatch):
    context = Context(CALIBRATION, cache=tmp_path)
    fresh = cached_scores(tiny(), "second_order", context)
    monkeypatch.setattr("gateskip_compress.pruning.score.score", lambda *_: pytest.fail("scored anew"))
    assert cached_scores(tiny(), "second_order", context) == fresh
    cut = []
    for share in (0.1, 0.3):
        model = tiny()
        start(model, tiny_tokenizer())
        apply(g.Prune(share=share, shape="uneven", multiple=8), model, context)
        cut.append(block_parameters(model))
    assert cut[0] > cut[1]
    with pytest.raises(pytest.fail.Exception, match="scored anew"):  # other text
        cached_scores(tiny(), "second_order", replace(context, calibration=CALIBRATION[:4]))


def test_gates_say_what_goes_and_their_surrogates_stay():
    gated = compress(tiny(), g.GateSkip(budget=0.8, rank=4, allocation="global"))
    model, whole = gated, ungated_macs_per_token(gated, 24)
    apply(g.Prune(share=0.1, by="gates", cut="branches"), model, Context(CALIBRATION))
    widths = model.gateskip.steps[1]["record"]["widths"]
    gone = [
        (layer, kind)
        for layer, pair in enumerate(widths)
        for kind, units in zip(("attention", "mlp"), pair, strict=True)
        if not units
    ]
    assert gone
    for layer, kind in gone:
        body = blocks(model)[layer].self_attn if kind == "attention" else blocks(model)[layer].mlp
        assert kind not in blocks(model)[layer].gates
        x = torch.randn(1, 5, 64)
        out = body(x)[0] if kind == "attention" else body(x)
        assert torch.equal(out.view(1, 5, 64), body.instead.replace(x))
    assert ungated_macs_per_token(model, 24) < whole
    ids = tokens(1, 24)
    with g.masked(model):
        masked = model(ids).logits
    torch.testing.assert_close(model(ids).logits, masked, atol=1e-4, rtol=1e-4)


def test_blocks_by_gates_and_by_perplexity(tmp_path):
    model = compress(tiny(), g.GateSkip(budget=0.8, rank=4, allocation="global"), g.Prune(blocks=1, by="gates"))
    assert len(blocks(model)) == 3
    model.save_pretrained(tmp_path / "x")
    again, _ = g.load(str(tmp_path / "x"), device=DEVICE)
    assert torch.equal(again(tokens(1, 24)).logits, model(tokens(1, 24)).logits)
    record = compress(tiny(), g.Prune(blocks=1, by="perplexity")).gateskip.steps[0]["record"]
    context = [Passage.whole(ids) for ids in CALIBRATION]
    without = []
    for layer in range(4):
        model = tiny()
        model.model.layers[layer].register_forward_hook(lambda _m, args, _out: args[0])
        without.append(evaluate(model, context).perplexity)
    assert record["removed"][0]["block"] == without.index(min(without))


def test_what_cannot_be_cut_is_said():
    for settings, message in (
        (dict(), "either blocks, a number of them, or share"),
        (dict(blocks=1, share=0.1), "either blocks"),
        (dict(share=1.0), r"share 1\.0 must be above 0 and below 1"),
        (dict(blocks=1, cut="width"), "give share"),
        (dict(share=0.1, cut="blocks", by="magnitude"), "for cut 'blocks', by 'magnitude' must be one of influence"),
        (dict(share=0.1, cut="branches", shape="uniform"), "no plain config"),
        (dict(share=0.1, cut="blocks", shape="uneven"), "leave shape out"),
        (dict(share=0.1, multiple=0), "multiple 0"),
    ):
        with pytest.raises(ValueError, match=message):
            g.Prune(**settings)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", dict(share=0.9, multiple=64), r"share 0\.9 is out of reach: the nearest that can go is 0\.33"),
        ("llama", dict(share=0.9, cut="blocks"), r"share 0\.9 is out of reach: the nearest that can go is 0\.75"),
        ("llama", dict(share=0.5, cut="attention", multiple=16), r"the nearest that can go is 0\.1"),
        ("gpt2", dict(share=0.1), "no gated linear unit"),
        ("opt", dict(share=0.1), "no gated linear unit"),
        ("olmo2", dict(share=0.1, cut="attention", multiple=16), "normed over all heads together: use cut='channels'"),
        ("phi3", dict(share=0.1, cut="attention", multiple=16, shape="uneven"), "asks its config for"),
    ],
)
def test_a_model_that_cannot_be_cut_so_says_why(family, settings, message):
    with pytest.raises((ValueError, g.UnsupportedModel), match=message):
        compress(tiny(family), g.Prune(**settings))


def test_a_shared_weight_is_not_cut():
    model = tiny()
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(g.UnsupportedModel, match=r"layers\.2\.mlp\.down_proj\.weight and .*layers\.0.* are one weight"):
        compress(model, g.Prune(**UNIFORM))


def test_heads_that_no_plain_config_can_have_are_left_out():
    # 3 heads do not divide a stream of 64: transformers refuses such a config
    model = tiny(num_key_value_heads=4)
    compress(model, g.Prune(share=0.05, cut="attention", multiple=16))
    assert model.config.num_attention_heads == 2
