"""The executable checks of the contract ``kd-mathematics`` about drawing a token.

Each takes ``mutant``: the planted mistake with which it must fail. A mutant changes what is checked, never the check.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentforge.contracts import Finding

# Upper 0.1 % of chi squared with 15 degrees of freedom; the draws are the same each time, so that this never flickers.
CHI_SQUARED_BOUND = 37.7

# Of (seed, position, id): seeds and positions beyond 32 bits and below zero, each of the four words of a counter. The
# hexadecimal is the fp32's own; made once from ``noise`` after that had been held against Salmon et al.'s vectors.
NOISE_BITS = (
    (0, 0, 0, "3f2cc257"),  # 0.674840
    (0, 0, 1, "bf40eb18"),  # -0.753587
    (0, 0, 2, "be9249cd"),  # -0.285719
    (0, 0, 3, "3d946d1a"),  # 0.072474
    (1, 0, 0, "bf4af6b3"),  # -0.792827
    (0, 1, 0, "3ea33013"),  # 0.318726
    (7, 41, 151935, "402aa67f"),  # 2.666412
    (-1, -1, 262143, "3ff3a3f2"),  # 1.903441
    (1099511627776, 5, 17, "3e8fbbd8"),  # 0.280730
    (-4611686018427387901, 8589934601, 50256, "bf9c8e95"),  # -1.223101
    (123456789012345678, 4611686018427387904, 128255, "3fb9fc1a"),  # 1.453006
)


def draws_follow_softmax(*, mutant: str | None = None) -> Finding:
    """20000 draws of 16 tokens are spread as softmax(z / T) says, on each backend of this machine."""
    import torch

    from latentforge.contracts import Finding
    from latentforge.kernels.decode import latent_decode
    from latentforge.kernels.fixtures import known_mutant
    from latentforge.kernels.noise import gumbel

    known_mutant(mutant, ("half_the_noise", "one_draw_repeated"))
    rows, vocab, temperature = 20000, 16, 1.5
    z = torch.randn(vocab, generator=torch.Generator().manual_seed(31)) * 2.0
    expected = torch.softmax(z.double() / temperature, 0) * rows
    hidden, weight = torch.ones(rows, 1), z[:, None].clone()
    seeds, positions = torch.full((rows,), 12345), torch.arange(rows)
    if mutant == "one_draw_repeated":
        positions = torch.zeros_like(positions)
    found = {}
    for backend in ("reference", "cpu"):
        if mutant == "half_the_noise":
            noise = gumbel(seeds[:, None], positions[:, None], torch.arange(vocab)[None, :])
            ids = (z / temperature + 0.5 * noise).argmax(1)
        else:
            keys = {"seeds": seeds, "positions": positions}
            ids = latent_decode(hidden, weight, temperature=temperature, backend=backend, **keys).ids
        counts = torch.bincount(ids, minlength=vocab).double()
        found[backend] = float(((counts - expected).square() / expected).sum())
    shown = ", ".join(f"{backend} {value:.1f}" for backend, value in found.items())
    return Finding(
        all(value < CHI_SQUARED_BOUND for value in found.values()),
        f"chi squared of {rows} draws over {vocab} tokens: {shown} (bound {CHI_SQUARED_BOUND:g})",
        {"chi_squared": found, "bound": CHI_SQUARED_BOUND},
    )


def noise_bits_fixed(*, mutant: str | None = None) -> Finding:
    """The noise of (seed, position, id) has the recorded bits, in torch and in every variant of the C++ kernels."""
    import struct

    import torch

    from latentforge.contracts import Finding
    from latentforge.kernels.fixtures import known_mutant
    from latentforge.kernels.native import native
    from latentforge.kernels.noise import gumbel

    known_mutant(mutant, ("halves_swapped", "position_ignored"))
    module = native()
    wrong: list[str] = []
    for seed, position, token, expected in NOISE_BITS:
        asked, at = seed, position
        if mutant == "halves_swapped":
            asked = ((seed & 0xFFFFFFFF) << 32 | (seed >> 32) & 0xFFFFFFFF) - (1 << 64) * bool(seed & 0x80000000)
        elif mutant == "position_ignored":
            at = 0
        got = {"torch": float(gumbel(*(torch.tensor([value]) for value in (asked, at, token))))}
        got["C++"] = module.gumbel(asked, at, token)
        for variant in module.cpu_variants():
            out = torch.empty(1)
            module.gumbel_noise(asked, at, token, 1, out.data_ptr(), variant)
            got[variant] = float(out)
        for name, value in got.items():
            bits = struct.pack(">f", value).hex()
            if bits != expected:
                wrong.append(f"{name} ({seed}, {position}, {token}): {bits}, recorded {expected}")
    count = len(NOISE_BITS) * (2 + len(module.cpu_variants()))
    said = f"; first: {wrong[0]}" if wrong else ""
    return Finding(
        not wrong and bool(NOISE_BITS),
        f"{count - len(wrong)} of {count} values have their recorded bits{said}",
        {"wrong": wrong[:10], "values": count},
    )
