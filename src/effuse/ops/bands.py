"""Pictures by frequency: Haar wavelets, spectra by radius, and the linear denoiser that is best."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BANDS = ("LL", "LH", "HL", "HH")
"""Low or high along the height, then along the width."""


def haar(x: Tensor) -> Tensor:
    """Return the four bands of one step of the orthonormal Haar transform.

    With a, b over c, d the pixels of a 2 x 2 cell:
    LL = (a + b + c + d) / 2,  LH = (a - b + c - d) / 2,  HL = (a + b - c - d) / 2,
    HH = (a - b - c + d) / 2.  The energy is that of x.

    Args:
        x: (*, C, H, W), H and W even.

    Returns:
        (*, 4, C, H / 2, W / 2), in the order of `BANDS`.

    Raises:
        ValueError: H or W is odd; pad the picture first.
    """
    h, w = x.shape[-2:]
    if h % 2 or w % 2:
        raise ValueError(f"{h} x {w}: expected an even height and width, pad by one row or column")
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    top, bottom, left, right = a + b, c + d, a - b, c - d
    return torch.stack([top + bottom, left + right, top - bottom, left - right], -4) / 2


def unhaar(bands: Tensor) -> Tensor:
    """Return x: (*, C, 2H, 2W) of its bands (*, 4, C, H, W): the inverse of `haar`.

    Raises:
        ValueError: there are not four bands.
    """
    if bands.ndim < 4 or bands.shape[-4] != 4:
        raise ValueError(f"bands of shape {tuple(bands.shape)}: expected (*, 4, C, H, W)")
    ll, lh, hl, hh = bands.unbind(-4)
    top, bottom = (ll + hl, lh + hh), (ll - hl, lh - hh)
    rows = [torch.stack([e + f, e - f], -1).flatten(-2) / 2 for e, f in (top, bottom)]
    return torch.stack(rows, -2).flatten(-3, -2)


def spectrum(x: Tensor) -> Tensor:
    """Return F x, the orthonormal 2-D DFT of x: (*, H, W), complex; in float32 or float64."""
    return torch.fft.fft2(x if x.dtype == torch.float64 else x.float(), norm="ortho")


def radii(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Return the frequency of each DFT coefficient in cycles a pixel, (H, W): 0 to sqrt(1/2)."""
    fy, fx = (torch.fft.fftfreq(n, dtype=torch.float64, device=device) for n in (height, width))
    return (fy[:, None].square() + fx.square()).sqrt()


def radial(power: Tensor, bins: int) -> Tensor:
    """Return the mean of power: (*, H, W) over rings of frequency, (*, bins).

    Rings are equally wide from 0 to 1/2; what is beyond, in the corners, counts to the last.
    Empty rings are not-a-number.
    """
    height, width = power.shape[-2:]
    which = (radii(height, width, power.device) * 2 * bins).long().clamp_max(bins - 1)
    flat = power.flatten(-2)
    total = flat.new_zeros(*flat.shape[:-1], bins).index_add_(-1, which.flatten(), flat)
    count = torch.bincount(which.flatten(), minlength=bins).to(total)
    return total / count


def power_by_radius(x: Tensor, bins: int = 16) -> Tensor:
    """Return the mean |F x|^2 of pictures x: (B, C, H, W) by ring, (bins,); see `radial`."""
    return radial(spectrum(x).abs().square().mean((0, 1)), bins)


def log_gap(x: Tensor, reference: Tensor, bins: int = 15) -> Tensor:
    """Return how far the spectra are apart in the low, middle and high third, (3,), in dB.

    Mean over rings of |10 log10(P_x / P_reference)|, without the ring of frequency zero.
    """
    apart = 10 * (power_by_radius(x, bins) / power_by_radius(reference, bins)).log10().abs()
    return torch.stack([part.nanmean() for part in apart[1:].tensor_split(3)])


def inverse_magnitude(x0: Tensor, exponent: float = -1.0, floor: float = 1e-3) -> Tensor:
    """Return weights |F x0|^exponent of each frequency, (B, 1, H, W), with mean 1 a sample.

    |F x0| is the mean over channels, at least `floor` times its largest. Exponent 0 weighs all
    alike; -1 favors what clean pictures have little of.

    x0: (B, C, H, W).
    """
    size = spectrum(x0).abs().mean(1, keepdim=True)
    top = size.amax((-2, -1), keepdim=True)
    if exponent < 0:
        size = torch.where(top > 0, size.maximum(floor * top), torch.ones_like(size))
    w = size**exponent
    return w / w.mean((-2, -1), keepdim=True)


def wiener(power: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the linear filters that best tell noise and clean picture from alpha x0 + sigma noise.

    H = sigma / (alpha^2 S + sigma^2)  for the noise,  G = alpha S / (alpha^2 S + sigma^2)  for x0

    power: S, the power of x0 at each frequency, any shape; the noise is white, of power 1.
    """
    both = alpha**2 * power + sigma**2
    return sigma / both, alpha * power / both


def wiener_error(
    power: Tensor, alpha: Tensor | float, sigma: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return the mean squared error of those filters, by frequency: of the noise, and of x0.

    alpha^2 S / (alpha^2 S + sigma^2)  and  S sigma^2 / (alpha^2 S + sigma^2)
    """
    both = alpha**2 * power + sigma**2
    return alpha**2 * power / both, power * sigma**2 / both


def resized(x0: Tensor, size: tuple[int, int]) -> Tensor:
    """Return x0: (B, C, H, W) at a smaller size, averaged over areas."""
    return x0 if tuple(x0.shape[-2:]) == size else F.adaptive_avg_pool2d(x0, size)
