"""Each kernel that this machine can run, against a naive float64 loop over the numbers that it was given."""

from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

native = pytest.importorskip("gateskip_compress.runtime._native", reason="the extension is not built")
KERNELS = [name for name, _ in native.kernels()]
PROMPTS = native.prompt_kernels()
for_prompts = pytest.mark.skipif(not PROMPTS, reason="no kernels here have a way of their own for prompts")
EIGHT_BIT_PROMPTS = native.prompt_kernels(fine=False)
TILES = native.prompt_kernels("bf16")
for_tiles = pytest.mark.skipif(not TILES, reason="no kernels here have a way of their own for prompts in bf16")
LANES = dict(native.kernels())
FLOAT = 2e-6
"""Rounding of float32 sums, beside the sum of their terms' sizes."""


@pytest.fixture(params=KERNELS)
def kernels(request):
    return request.param


def random_codes(rng, rows, columns, group, bits):
    """Codes, scales of wide range, zero points, and the float64 matrix that they stand for."""
    groups = -(-columns // group)
    codes = rng.integers(0, 2**bits, (rows, columns), dtype=np.uint8)
    zero = rng.integers(0, 2**bits, (rows, groups), dtype=np.uint8)
    scale = (10.0 ** rng.uniform(-6, 6, (rows, groups))).astype(np.float32)
    if rng.integers(2):  # kept as float16
        scale = scale.clip(1e-7, 6e4).astype(np.float16).astype(np.float32)
    weight = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            at = column // group
            weight[row, column] = float(scale[row, at]) * (int(codes[row, column]) - int(zero[row, at]))
    return codes, scale, zero, weight


def rounded(kernels, x, fine):
    """What the kernels make of activations, as float64."""
    q, rest, scale, _ = native.quantize(kernels, x, fine)
    chunks = np.repeat(scale.astype(float), 32, axis=1)
    return ((q * 256.0 + rest if fine else q) * chunks)[:, : x.shape[1]]


def close_sums(found, weight, x, bias=0):
    """Products equal their float64 sums up to rounding beside the terms, which may cancel."""
    terms = np.abs(x) @ np.abs(weight).T
    assert np.all(np.abs(found - (x @ weight.T + bias)) <= FLOAT * (terms + np.abs(bias)) + 1e-30)


def packed(kernels, kind, codes, scale, zero, group, bias=None):
    data = native.pack_codes(kernels, kind, codes, scale, zero, group)
    return native.HeldMatrix(kernels, kind, *codes.shape, group, data, bias)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_scales_that_are_float16_take_two_bytes_and_give_the_same_bits(kernels, kind):
    rng = np.random.default_rng(0)
    codes, scale, zero, _ = random_codes(rng, 48, 320, 64, int(kind[3:]))
    scale = scale.clip(1e-7, 6e4).astype(np.float16).astype(np.float32)
    scale[-1] = 1
    finer = scale.copy()
    finer[-1, -1] *= 1.001  # one that is not makes all floats
    x = rng.standard_normal((9, 320)).astype(np.float32)
    sizes = [native.pack_codes(kernels, kind, codes, each, zero, 64).nbytes for each in (scale, finer)]
    assert sizes[1] - sizes[0] == 48 * 5 * 2
    for fine in (False, True):
        short, whole = (
            native.multiply(kernels, packed(kernels, kind, codes, each, zero, 64), x, fine) for each in (scale, finer)
        )
        assert np.array_equal(short[:, :-1], whole[:, :-1])
        assert not np.array_equal(short[:, -1], whole[:, -1])


@pytest.mark.parametrize("fine", [False, True], ids=["8 bit", "16 bit"])
@pytest.mark.parametrize("kind", ["int4", "int8"])
@given(
    rows=st.integers(1, 40),
    columns=st.one_of(st.integers(1, 23).map(lambda eighth: 8 * eighth), st.sampled_from([64, 128, 192, 320])),
    group=st.sampled_from([32, 64, 96, 128]),
    count=st.integers(1, 35),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=12, deadline=None)
def test_products_of_codes(kind, fine, rows, columns, group, count, seed):
    rng = np.random.default_rng(seed)
    codes, scale, zero, weight = random_codes(rng, rows, columns, group, int(kind[3:]))
    x = (rng.standard_normal((count, columns)) * 10.0 ** rng.uniform(-4, 4, (count, 1))).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32)
    for kernels in KERNELS:
        found = native.multiply(kernels, packed(kernels, kind, codes, scale, zero, group, bias), x, fine)
        # zero points are taken off after summing, so rounding is beside codes, not beside code - zero
        around = np.repeat(scale.astype(float) * zero, group, axis=1)[:, :columns]
        at = rounded(kernels, x, fine)
        slack = FLOAT * (np.abs(at) @ (np.abs(weight) + 2 * around).T + np.abs(bias))
        assert np.all(np.abs(found - (at @ weight.T + bias)) <= slack + 1e-30), kernels


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_extreme_codes_do_not_overflow(kernels, kind):
    """All codes and activations at their ends: what 16-bit sums inside a kernel must hold."""
    most, columns = (15, 192) if kind == "int4" else (255, 192)
    for code, count in product((0, most), (3, 20)):
        codes = np.full((9, columns), code, dtype=np.uint8)
        scale, zero = np.ones((9, 2), dtype=np.float32), np.full((9, 2), most - code, dtype=np.uint8)
        for sign in (1, -1):
            x = np.full((count, columns), 127 * sign, dtype=np.float32)
            found = native.multiply(kernels, packed(kernels, kind, codes, scale, zero, 128), x, False)
            assert np.array_equal(found, np.full((count, 9), 127.0 * sign * columns * (2 * code - most)))


@pytest.mark.parametrize("kind", ["bf16", "f32"])
@given(rows=st.integers(1, 140), columns=st.integers(1, 70), count=st.integers(1, 14), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=12, deadline=None)
def test_products_of_floats(kind, rows, columns, count, seed):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((rows, columns)) * 10.0 ** rng.uniform(-9, 9, (rows, 1))).astype(np.float32)
    x = rng.standard_normal((count, columns)).astype(np.float32)
    kept = weight if kind == "f32" else nearest_bf16(weight)
    for kernels in KERNELS:
        matrix = native.HeldMatrix(kernels, kind, rows, columns, 32, native.pack_floats(kernels, kind, weight))
        close_sums(native.multiply(kernels, matrix, x, False), kept.astype(float), x.astype(float))


def nearest_bf16(value):
    """By exhaustive choice between the two neighbours, ties to the even one."""
    down = value.view(np.uint32) & np.uint32(0xFFFF0000)
    low, high = down.view(np.float32), (down + np.uint32(0x10000)).view(np.float32)
    left, right = np.abs(value.astype(float) - low), np.abs(high.astype(float) - value)
    even = (down >> np.uint32(16)) % 2 == 0
    return np.where((left < right) | ((left == right) & even), low, high)


@pytest.mark.parametrize("kind", ["int4", "int8", "bf16", "f32"])
@pytest.mark.parametrize("fine", [False, True], ids=["8 bit", "16 bit"])
@pytest.mark.parametrize(("columns", "group"), [(104, 64), (192, 64), (192, 128), (320, 192)])
def test_tokens_together_give_the_bits_of_tokens_alone(kernels, kind, fine, columns, group):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((37, columns)).astype(np.float32)
    if kind.startswith("int"):
        codes, scale, zero, _ = random_codes(rng, 101, columns, group, int(kind[3:]))
        matrix = packed(kernels, kind, codes, scale, zero, group)
    else:
        weight = rng.standard_normal((101, columns)).astype(np.float32)
        matrix = native.HeldMatrix(kernels, kind, 101, columns, 32, native.pack_floats(kernels, kind, weight))
    alone = np.stack([native.multiply(kernels, matrix, row[None], fine)[0] for row in x])
    for count in (2, 3, 4, 11, 16, 37):
        assert np.array_equal(native.multiply(kernels, matrix, x[:count], fine), alone[:count])


def halves(x, fine):
    """What prompts take of activations: the nearest bfloat16, with `fine` plus the nearest of what that leaves."""

    def nearest(x):  # of two as near, the larger one
        return ((x.view(np.int32) + 0x8000) & -0x10000).view(np.float32).astype(float)

    high = nearest(x)
    return high + nearest((x - high).astype(np.float32)) if fine else high


@for_tiles
@pytest.mark.parametrize("fine", [False, True], ids=["8 bit", "16 bit"])
@given(
    rows=st.integers(1, 200),
    columns=st.one_of(st.integers(1, 200), st.sampled_from([576, 640, 1536])),
    count=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_products_of_prompts(fine, rows, columns, count, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((count, columns)) * 10.0 ** rng.uniform(-4, 4, (count, 1))).astype(np.float32)
    weight = (rng.standard_normal((rows, columns)) * 10.0 ** rng.uniform(-9, 9, (rows, 1))).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32)
    for kernels in TILES:
        data = native.pack_floats(kernels, "bf16", weight)
        matrix = native.HeldMatrix(kernels, "bf16", rows, columns, 32, data, bias)
        found = native.multiply(kernels, matrix, x, fine, prompt=True)
        close_sums(found, nearest_bf16(weight).astype(float), halves(x, fine), bias)
        some = native.multiply(kernels, matrix, x[: (count + 1) // 2], fine, prompt=True)
        assert np.array_equal(some, found[: len(some)])  # neighbours change no bit of a token's sums


def rounded_rows(x, most):
    """Whole rows to codes up to `most` that share a scale, by the same steps in float32; as float64."""
    most = np.float32(most)
    top = np.abs(x).max(axis=1, keepdims=True)
    codes = np.rint(x * (most / top)).clip(-most, most)
    return codes.astype(float) * (top / most).astype(float)


@for_prompts
@pytest.mark.parametrize("fine", [False, True], ids=["8 bit", "16 bit"])
@given(
    rows=st.integers(1, 100),
    spans=st.integers(1, 9),
    group=st.sampled_from([64, 128, 192]),
    count=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_products_of_codes_of_prompts(fine, rows, spans, group, count, seed):
    rng = np.random.default_rng(seed)
    codes, scale, zero, weight = random_codes(rng, rows, 64 * spans, group, 4)
    x = (rng.standard_normal((count, 64 * spans)) * 10.0 ** rng.uniform(-4, 4, (count, 1))).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32)
    for kernels in PROMPTS if fine else EIGHT_BIT_PROMPTS:
        matrix = packed(kernels, "int4", codes, scale, zero, group, bias)
        found = native.multiply(kernels, matrix, x, fine, prompt=True)
        most = 16368 if kernels == "zen4" else 32639  # of 15 bits, of 16
        close_sums(found, weight, rounded_rows(x, most) if fine else rounded(kernels, x, False), bias)
        some = native.multiply(kernels, matrix, x[: (count + 1) // 2], fine, prompt=True)
        assert np.array_equal(some, found[: len(some)])  # neighbours change no bit of a token's sums


@for_prompts
def test_extreme_codes_of_prompts_do_not_overflow():
    columns = 1536
    for code, sign in product((0, 15), (1, -1)):
        codes, scale = np.full((9, columns), code, dtype=np.uint8), np.ones((9, 1), dtype=np.float32)
        zero, x = np.full((9, 1), 15 - code, dtype=np.uint8), np.full((20, columns), 32639 * sign, dtype=np.float32)
        for kernels, fine in [(name, True) for name in PROMPTS] + [(name, False) for name in EIGHT_BIT_PROMPTS]:
            matrix = packed(kernels, "int4", codes, scale, zero, columns)
            found = native.multiply(kernels, matrix, x, fine, prompt=True)
            np.testing.assert_allclose(found, 32639.0 * sign * columns * (2 * code - 15), rtol=1e-6)


@for_prompts
@pytest.mark.parametrize(("kind", "fine"), [("bf16", True), ("int4", True), ("int4", False)])
def test_an_undefined_value_of_a_prompt_stays_its_tokens_own(kind, fine):
    x = np.ones((20, 64), dtype=np.float32)
    x[3, 40], x[7, 2] = np.inf, np.nan
    for kernels in native.prompt_kernels(kind, fine):
        data = native.pack_floats(kernels, "bf16", np.ones((40, 64), dtype=np.float32))
        matrix = native.HeldMatrix(kernels, "bf16", 40, 64, 64, data)
        if kind == "int4":
            codes, scale, zero, _ = random_codes(np.random.default_rng(0), 40, 64, 64, 4)
            matrix = packed(kernels, "int4", codes, scale, zero, 64)
        found = native.multiply(kernels, matrix, x, fine, prompt=True)
        assert np.array_equal(np.isfinite(found).all(axis=1), np.isfinite(x).all(axis=1))


@for_prompts
@pytest.mark.parametrize(("columns", "group", "fine"), [(96, 64, True), (64, 32, True), (64, 64, False)])
def test_codes_that_prompts_have_no_way_for_are_refused(columns, group, fine):
    codes, scale, zero, _ = random_codes(np.random.default_rng(0), 4, columns, group, 4)
    for kernels in PROMPTS if fine else set(PROMPTS) - set(EIGHT_BIT_PROMPTS):
        matrix = packed(kernels, "int4", codes, scale, zero, group)
        with pytest.raises(ValueError, match="prompts have a way of their own for codes of 4 bits"):
            native.multiply(kernels, matrix, np.ones((2, columns), dtype=np.float32), fine, prompt=True)


@given(width=st.integers(1, 200), power=st.floats(-30, 30), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_rounding_of_activations(width, power, seed):
    x = (np.random.default_rng(seed).standard_normal((2, width)) * 10.0**power).astype(np.float32)
    for kernels in KERNELS:
        q, rest, scale, sums = native.quantize(kernels, x, True)
        codes = 256 * q.astype(int) + rest
        assert np.abs(codes).max() == 32639
        assert np.abs(q.astype(int)).max() == 127
        assert np.all(codes[:, width:] == 0)
        for row in range(2):
            for chunk in range(scale.shape[1]):
                step = np.abs(x[row, chunk // 2 * 64 :][:64].astype(float)).max() / 32639
                assert np.isclose(scale[row, chunk], step, rtol=1e-6, atol=0)
                own = codes[row, 32 * chunk : 32 * chunk + 32]
                part = x[row, 32 * chunk : 32 * chunk + 32].astype(float)
                assert np.all(np.abs(own[: len(part)] * step - part) <= step * 0.51)
                assert np.isclose(sums[row, chunk], step * own.sum(), rtol=1e-5, atol=step * 1e-5)


def test_a_zero_chunk_is_zero_and_an_undefined_value_stays_one(kernels):
    codes, scale, zero, _ = random_codes(np.random.default_rng(0), 5, 64, 32, 4)
    matrix = packed(kernels, "int4", codes, scale, zero, 32)
    x = np.zeros((4, 64), dtype=np.float32)
    x[1, 3], x[2, 40], x[3, 5] = np.nan, np.inf, 1e-42
    found = native.multiply(kernels, matrix, x, True)
    assert np.array_equal(found[0], np.zeros(5))
    assert np.isnan(found[1:3]).all()
    assert np.isfinite(found[3]).all()


@pytest.mark.parametrize("width", [1, 7, 16, 50, 576])
def test_norm_and_gated_units(kernels, width):
    rng = np.random.default_rng(width)
    x, w = (rng.standard_normal(width).astype(np.float32) for _ in range(2))
    expected = x.astype(float) / np.sqrt(np.mean(x.astype(float) ** 2) + 1e-5) * w
    np.testing.assert_allclose(native.norm(kernels, x, w, 1e-5), expected, rtol=1e-5, atol=1e-6)
    gate = (30 * x).astype(np.float32)
    expected = gate / (1 + np.exp(-gate.astype(float))) * w
    np.testing.assert_allclose(native.glu(kernels, gate, w, "silu"), expected, rtol=2e-6, atol=1e-11)
    wide = (3 * x).astype(float)
    expected = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3))) * w
    # far below zero, where 1 + tanh nearly cancels, float32's argument decides how little is left
    np.testing.assert_allclose(native.glu(kernels, wide.astype(np.float32), w, "gelu"), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activations_far_out_are_finite(kernels, activation):
    gate = np.array([-1e30, -200, -90, 90, 200, 1e30], dtype=np.float32)
    found = native.glu(kernels, gate, np.ones(6, dtype=np.float32), activation)
    np.testing.assert_allclose(found, [0, 0, 0, 90, 200, 1e30], rtol=1e-6, atol=1e-6)


def _as_kept(keys, values, element):
    """Keys and values, by position, as a cache of such elements keeps them."""
    if element != "int8":
        return [part.astype(np.float16 if element == "f16" else np.float32).astype(float) for part in (keys, values)]
    groups = np.split(keys, range(32, keys.shape[1], 32), axis=1)
    return [np.concatenate([_rounded(part) for part in groups], axis=1), _rounded(values)]


def _rounded(part):
    most = np.abs(part).max(axis=1, keepdims=True)
    return np.rint(part * (np.float32(127) / most)).astype(float) * (most / np.float32(127))


@pytest.mark.parametrize("kernels", KERNELS)
@given(count=st.integers(1, 70), spread=st.floats(0.01, 60), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_exp_sum(kernels, count, spread, seed):
    x = (spread * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)
    expected = np.exp(x.astype(float) - float(x.max())).sum()
    np.testing.assert_allclose(native.exp_sum(kernels, x, x.max()), expected, rtol=1e-5)


@pytest.mark.parametrize("kernels", KERNELS)
@given(
    count=st.integers(1, 200), spread=st.floats(0.01, 60), left_out=st.floats(0, 0.99), seed=st.integers(0, 2**32 - 1)
)
@settings(max_examples=50, deadline=None)
def test_draw(kernels, count, spread, left_out, seed):
    rng = np.random.default_rng(seed)
    scores = (spread * rng.standard_normal(count)).astype(np.float32)
    scores[rng.permutation(count)[: int(left_out * count)]] = -np.inf
    below = np.cumsum(np.exp(scores.astype(float) - float(scores.max())))
    for chance in (0, *rng.random(20), 1 - 2**-53):
        found = native.draw(kernels, scores, chance)
        assert scores[found] > -np.inf
        # as a loop finds it, but for a chance at the edge between two
        assert (
            (below[found - 1] if found else 0) - 1e-5 * below[-1]
            <= chance * below[-1]
            <= below[found] * (1 + 1e-5) + 1e-30
        )


def left_by(scores, temperature, top_k, top_p, min_p):
    """Weights of what limits leave one after the other, in float64, and how near to another choice one of them came."""
    x = (scores / np.float32(temperature)).astype(float)
    if top_k:
        x[x < np.sort(x)[-min(top_k, len(x))]] = -np.inf
    weights = np.exp(x - x.max())
    order = np.argsort(-weights)
    before = np.cumsum(weights[order]) - weights[order]
    edges = [1.0]
    edges += list(before / weights.sum() - top_p) if top_p < 1 else []
    edges += list(weights - min_p) if min_p else []
    left = weights.copy()
    if top_p < 1:
        left[order[1:][before[1:] >= top_p * weights.sum()]] = 0
    left[weights < min_p] = 0
    return left, np.abs(edges).min()


@given(
    count=st.one_of(st.integers(1, 200), st.just(3000)),
    spread=st.floats(0.1, 30),
    temperature=st.sampled_from([1, 0.7, 2.5]),
    top_k=st.one_of(st.just(0), st.integers(1, 300)),
    top_p=st.one_of(st.just(1), st.floats(0.01, 1)),
    min_p=st.one_of(st.just(0), st.floats(0.01, 0.99)),
    left_out=st.floats(0, 0.9),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_draw_within_limits(count, spread, temperature, top_k, top_p, min_p, left_out, seed):
    rng = np.random.default_rng(seed)
    scores = (spread * rng.standard_normal(count)).astype(np.float32)
    scores[rng.permutation(count)[: int(left_out * count)]] = -np.inf
    weights, near = left_by(scores, temperature, top_k, top_p, min_p)
    assume(near > 1e-5)
    below = np.cumsum(weights)
    for kernels in KERNELS:
        for chance in (0, *rng.random(20), 1 - 2**-53):
            found = native.draw(kernels, scores, chance, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
            assert weights[found] > 0
            before, after = (below[found - 1] if found else 0), below[found]
            assert before - 1e-5 * below[-1] <= chance * below[-1] <= after * (1 + 1e-5) + 1e-30


@pytest.mark.parametrize("limits", [dict(temperature=0), dict(top_k=-1), dict(top_p=-0.1), dict(min_p=1.5)])
def test_limits_that_leave_nothing_are_refused(limits):
    with pytest.raises(ValueError, match="a temperature is above 0, top_k and top_p are at least 0"):
        native.draw("portable", np.ones(3, dtype=np.float32), 0.5, **limits)


@pytest.mark.parametrize("scores", [[-np.inf, -np.inf], [0, np.nan], [np.inf, 0], [np.nan] * 70])
def test_what_has_no_chances_is_not_drawn_from(scores):
    for kernels in KERNELS:
        with pytest.raises(ValueError, match="no token can be drawn"):
            native.draw(kernels, np.array(scores, dtype=np.float32), 0.5)
        with pytest.raises(ValueError, match="no token can be drawn"):
            native.draw(kernels, np.array(scores, dtype=np.float32), 0.5, top_p=0.9)


def close_attention(kernels, found, query, kept, begins, ends, rounding):
    """What queries attend to equals a float64 softmax; scores have the rounding of their sums, which it takes over."""
    for i, own in enumerate(map(slice, begins, ends)):
        score = kept[0][own] @ query[i].astype(float)
        weight = np.exp(score - score.max())
        slack = rounding * (1 + np.abs(kept[0][own]) @ np.abs(query[i].astype(float))).max()
        expected = weight / weight.sum() @ kept[1][own]
        np.testing.assert_allclose(found[i], expected, rtol=0, atol=slack, err_msg=kernels)


@pytest.mark.parametrize("element", ["f32", "f16", "int8"])
@given(
    seen=st.lists(st.tuples(st.integers(0, 599), st.integers(1, 600)), min_size=1, max_size=12),
    sixteens=st.integers(1, 9),
    sharp=st.floats(0.01, 20),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_attention(element, seen, sixteens, sharp, seed):
    rng, d = np.random.default_rng(seed), 16 * sixteens
    ends = np.array([end for _, end in seen], dtype=np.int32)
    begins = np.array([begin % end if begin % 2 else 0 for begin, end in seen], dtype=np.int32)
    positions = ends.max()
    query = (sharp * rng.standard_normal((len(seen), d))).astype(np.float32)
    keys, values = (rng.standard_normal((positions, d)).astype(np.float32) for _ in range(2))
    kept = _as_kept(keys, values, element)
    for kernels in KERNELS:
        found = native.attend(kernels, query, keys, values, begins, ends, element)
        close_attention(kernels, found, query, kept, begins, ends, 1e-5)
        alone = [
            native.attend(kernels, query[i : i + 1], keys, values, begins[i : i + 1], ends[i : i + 1], element)[0]
            for i in range(len(seen))
        ]
        assert np.array_equal(found, np.stack(alone)), kernels


@for_prompts
@pytest.mark.parametrize("element", ["f32", "f16", "int8"])
@given(
    count=st.integers(1, 50),
    first=st.integers(0, 600),
    window=st.one_of(st.none(), st.integers(1, 300)),
    sixteens=st.integers(1, 9),
    sharp=st.floats(0.01, 20),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_attention_of_prompts(element, count, first, window, sixteens, sharp, seed):
    """Of neighbouring tokens, some of which may be skipped, from a position on, against float64."""
    rng, d = np.random.default_rng(seed), 16 * sixteens
    ends = np.sort(first + 1 + rng.integers(0, 2 * count, count)).astype(np.int32)
    begins = np.maximum(0, ends - window).astype(np.int32) if window else np.zeros_like(ends)
    query = (sharp * rng.standard_normal((count, d)) / np.sqrt(d)).astype(np.float32)
    keys, values = (rng.standard_normal((ends.max(), d)).astype(np.float32) for _ in range(2))
    kept = _as_kept(keys, values, element)
    for kernels in PROMPTS:
        found = native.attend(kernels, query, keys, values, begins, ends, element, prompt=True)
        scored = query, kept[0]  # or two of bfloat16, 16 bits
        if kernels in EIGHT_BIT_PROMPTS and element != "f32":
            scored = rounded_rows(query, 5792), rounded_rows(kept[0].astype(np.float32), 5792)
        close_attention(kernels, found, scored[0], (scored[1], kept[1]), begins, ends, 3e-5)
        half = (count + 1) // 2
        some = native.attend(kernels, query[:half], keys, values, begins[:half], ends[:half], element, prompt=True)
        assert np.array_equal(some, found[:half])  # neither later queries nor later positions change a bit


@for_prompts
@pytest.mark.parametrize("element", ["f16", "int8"])
@pytest.mark.parametrize(("key", "query"), [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_extreme_scores_of_prompts_do_not_overflow(element, key, query):
    keys = np.full((70, 128), float(key), dtype=np.float32)
    keys[40] = -key
    values = np.random.default_rng(0).standard_normal((70, 128)).astype(np.float32)
    queries, begins, ends = (
        np.full((20, 128), query / 64, dtype=np.float32),
        np.zeros(20, np.int32),
        np.full(20, 70, np.int32),
    )
    kept = _as_kept(keys, values, element)
    for kernels in PROMPTS:
        found = native.attend(kernels, queries, keys, values, begins, ends, element, prompt=True)
        close_attention(kernels, found, queries, kept, begins, ends, 3e-5)


@for_prompts
@pytest.mark.parametrize("element", ["f32", "f16"])
def test_undefined_keys_and_queries_of_prompts_stay_their_own(element):
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 300, 64)).astype(np.float32)
    queries, ends = rng.standard_normal((20, 64)).astype(np.float32), np.arange(281, 301, dtype=np.int32)
    keys[290, 3], queries[5, 7] = np.nan, np.inf
    for kernels in PROMPTS:
        found = native.attend(kernels, queries, keys, values, np.zeros(20, np.int32), ends, element, prompt=True)
        assert np.array_equal(np.isfinite(found).all(axis=1), (ends <= 290) & (np.arange(20) != 5))


def test_kernels_without_a_way_for_prompts_say_so():
    ones = np.ones((2, 32), dtype=np.float32)
    matrix = native.HeldMatrix("portable", "bf16", 2, 32, 32, native.pack_floats("portable", "bf16", ones))
    with pytest.raises(ValueError, match="kernels 'portable' have no way of their own for prompts"):
        native.multiply("portable", matrix, ones, True, prompt=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: native.pack_codes("neon9", "int4", *_codes(), 32), "kernels 'neon9' cannot run here; these can: "),
        (lambda: native.pack_codes("portable", "int5", *_codes(), 32), "kind 'int5' must be int4, int8"),
        (lambda: native.pack_codes("portable", "int4", *_codes(16), 32), "int4 are at most 15"),
        (lambda: native.pack_codes("portable", "int4", *_codes(), 48), "group 48 must be a multiple of 32"),
        (lambda: native.pack_codes("portable", "int4", *_codes(), 64), "8 rows and 1 groups"),
        (lambda: native.HeldMatrix("portable", "f32", 8, 8, 32, np.zeros(8, np.uint8)), "have 8 bytes, not the 256"),
    ],
    ids=["kernels", "kind", "code", "group", "scales", "bytes"],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _codes(code=3):
    ones = np.ones((8, 2))
    return np.full((8, 64), code, dtype=np.uint8), ones.astype(np.float32), ones.astype(np.uint8)
