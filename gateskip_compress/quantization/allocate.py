"""Which projection gets how many bits, under a mean: by how much rounding moves the loss, and the weights it has."""

from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model import watch_gradients
from ..step import Context
from .groups import BITS, GroupWeight, dequantize

MEASURED_TOKENS = 4096
"""Of the calibration text, at most."""


def allocate_bits(
    model: PreTrainedModel,
    found: dict[str, nn.Linear],
    fixed: dict[str, int],
    mean: float,
    rounded: Callable[[Tensor, int], GroupWeight],
    context: Context,
) -> dict[str, int]:
    """Bits of every projection, so that their mean over all weights is at most `mean`.

    A projection's rounding changes its output by e(t) at token t, and so, to first order, the loss by g(t) · e(t), with
    g the loss's gradient at that output. Its cost is the sum of (g(t) · e(t))² over the text, the empirical Fisher
    estimate. From the fewest bits on, the projection that lowers it most for each bit that it takes goes first.

    Args:
        model: In float.
        found: What is quantized.
        fixed: Bits that are settled; they count in the mean.
        mean: The mean.
        rounded: Quantizes a weight to some bits.
        context: Text to measure on.

    Raises:
        ValueError: what is settled alone has more bits than the mean allows.
    """
    sizes = {name: linear.weight.numel() for name, linear in found.items()}
    bits = {name: fixed.get(name, min(BITS)) for name in found}
    room = mean * sum(sizes.values()) - sum(bits[name] * size for name, size in sizes.items())
    if room < 0:
        least = mean - room / sum(sizes.values())
        raise ValueError(f"mean_bits {mean} is out of reach: bits_of alone needs {least:.2f}")
    costs = _costs(model, {name: linear for name, linear in found.items() if name not in fixed}, rounded, context)
    while True:
        options = [
            ((costs[name, bits[name]] - costs[name, more]) / ((more - bits[name]) * sizes[name]), name, more)
            for name in found
            for more in BITS
            if name not in fixed and more > bits[name] and (more - bits[name]) * sizes[name] <= room
        ]
        if not options:
            return bits
        _, name, more = max(options)
        room -= (more - bits[name]) * sizes[name]
        bits[name] = more


def _costs(
    model: PreTrainedModel,
    found: dict[str, nn.Linear],
    rounded: Callable[[Tensor, int], GroupWeight],
    context: Context,
) -> dict[tuple[str, int], float]:
    """By projection and bits."""
    missed = {
        (name, bits): dequantize(rounded(linear.weight.data, bits)) - linear.weight.data
        for name, linear in found.items()
        for bits in BITS
    }
    costs = dict.fromkeys(missed, 0.0)

    def see(name: str, x: Tensor, gradient: Tensor) -> None:
        for bits in BITS:
            error = x @ missed[name, bits].T
            costs[name, bits] += float(((gradient * error).sum(-1) ** 2).sum())

    windows = context.calibration[: max(1, MEASURED_TOKENS // context.calibration.shape[1])]
    with watch_gradients(model, found, see):
        for window in context.track(list(windows), "measure bits"):
            ids = window[None].to(model.device)
            model(ids, labels=ids, use_cache=False).loss.backward()
    return costs
