import pytest
import torch

from gateskip_compress.gating.closed_form import Moments, backward_elimination, effect, reduced_rank, regress


def data(noise=0.0, n=400, d=6, o=5, rank=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator) + 3
    mapping = torch.randn(d, rank, generator=generator) @ torch.randn(rank, o, generator=generator)
    return x, x @ mapping + 1 + noise * torch.randn(n, o, generator=generator)


def moments(x, y, parts=3):
    sums = Moments.zeros(x.shape[1], y.shape[1], x.device)
    for part in zip(x.chunk(parts), y.chunk(parts), strict=True):
        sums.add(*part)
    return sums


def test_regression_equals_least_squares_with_a_column_of_ones():
    x, y = data(noise=0.5)
    slope, intercept = regress(moments(x, y), ridge=1e-9)
    design = torch.cat((x, torch.ones(len(x), 1)), dim=1).double()
    expected = torch.linalg.lstsq(design, y.double()).solution.float()
    torch.testing.assert_close(torch.cat((slope, intercept[None])), expected, atol=1e-3, rtol=1e-3)


def test_a_map_of_the_right_rank_is_found_exactly():
    x, y = data()
    down, up, offset = reduced_rank(moments(x, y), rank=2, ridge=1e-9)
    torch.testing.assert_close(x @ down @ up + offset, y, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_reduced_rank_beats_any_other_projection_of_least_squares(rank):
    x, y = data(noise=1.0, rank=4)
    sums = moments(x, y)
    down, up, offset = reduced_rank(sums, rank, ridge=1e-9)
    best = (y - x @ down @ up - offset).square().sum()
    slope, _ = regress(sums, ridge=1e-9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        basis, _ = torch.linalg.qr(torch.randn(y.shape[1], rank, generator=generator))
        other = (y - y.mean(0)) - (x - x.mean(0)) @ slope @ basis @ basis.T
        assert best <= other.square().sum() * (1 + 1e-4)


def test_a_rank_beyond_the_width_is_refused():
    with pytest.raises(ValueError, match=r"rank 6 must be in 1\.\.5"):
        reduced_rank(moments(*data()), rank=6, ridge=0.1)


def test_effect_is_the_log_of_the_ratio_of_norms():
    missed, residual = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 10.0], [1.0, 0.0]])
    values = effect(missed, residual)
    assert values[0].item() == pytest.approx(-0.6931, abs=1e-4)
    assert torch.isfinite(values).all()


def test_backward_elimination_drops_what_the_rest_makes_up_for():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    weight = torch.randn(7, 24, generator=generator)
    y = (x @ weight.T).double()

    def lost(inputs: list[int]) -> float:
        kept = x[:, inputs].double()
        return float((kept @ torch.linalg.lstsq(kept, y).solution - y).square().sum())

    left = list(range(24))
    while len(left) > 6:
        by_loss = sorted(left, key=lambda out: lost([i for i in left if i != out]))
        left = sorted(by_loss[max(1, min(len(left) // 8, len(left) - 6)) :])
    assert backward_elimination(x.T @ x, weight, 6, 1e-9).tolist() == left
