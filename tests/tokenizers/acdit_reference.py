"""ACDiT in PyTorch, from the description of the paper (arXiv 2412.07720 §4, appendices B and C) and nothing of ours.

Rows are named, masked and turned one pair at a time, so that a mistake would have to be made twice to go unseen.
`torch` is an argument, so that tests that do without it can be collected.

Legend: B batch, N blocks, R tokens of a block, L tokens, S = 2 L rows, P values of a token, D width, E head dimension.
"""

import math

import numpy as np


def mask(torch, blocks: int, size: int):
    """Appendix C: which rows see which, bool [S, S]; clean rows come first."""
    seen = torch.zeros(2 * blocks * size, 2 * blocks * size, dtype=torch.bool)

    def let(query, key):
        """Blocks numbered over both halves."""
        seen[query * size : (query + 1) * size, key * size : (key + 1) * size] = True

    for i in range(blocks):
        let(i, i)
        let(blocks + i, blocks + i)
        for j in range(i):
            let(i, j)
            let(blocks + i, j)
    return seen


def places(side: int, size: int) -> list[tuple[int, int]]:
    """Row and column of each token, block after block."""
    n = math.isqrt(size)
    corners = [(top, left) for top in range(0, side, n) for left in range(0, side, n)]
    return [(top + i // n, left + i % n) for top, left in corners for i in range(size)]


def turn(x, at, kind):
    """x [..., S, E] with rotary positions; at: (row, column) of each of the S rows. Bases are 100 at these lengths."""
    e = x.shape[-1]
    half, out = e // 2, x.clone()
    for s, (row, column) in enumerate(at):
        for i in range(half):
            a, b = x[..., s, i], x[..., s, i + half]
            if kind == "nd":  # half of the pairs turn with the row, half with the column
                place, j = (row, i) if i < half // 2 else (column, i - half // 2)
                low = high = place * 100.0 ** (-2 * j / half)
            else:  # lower dimensions turn with the row, upper with the column, frequencies from 1 to 1 / 100
                quarter = half // 2
                low, high = (place * 100.0 ** -((i % quarter) / (quarter - 1)) for place in (row, column))
            out[..., s, i] = a * math.cos(low) - b * math.sin(low)
            out[..., s, i + half] = b * math.cos(high) + a * math.sin(high)
    return out


def normed(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def sinusoids(torch, step, width=256):
    angle = step[..., None] * torch.exp(-math.log(10_000.0) * torch.arange(width // 2, dtype=step.dtype) * 2 / width)
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


class Reference:
    """Parameters are drawn at random, none of them zero.

    Attributes:
      w: name → tensor that wants a gradient.
    """

    def __init__(self, torch, *, depth, width, heads, values, classes, side, size, kind, seed=0):
        self.torch = torch
        self.heads, self.size, self.kind, self.depth = heads, size, kind, depth
        self.at, self.blocks = places(side, size), side * side // size
        d, generator = width, np.random.default_rng(seed)
        shapes = {"x": (d, values), "t0.w": (d, 256), "t0.b": (d,), "t2.w": (d, d), "t2.b": (d,), "y": (classes + 1, d)}
        for i in range(depth):
            shapes |= {
                f"{i}.norm1": (d,),
                f"{i}.norm2": (d,),
                f"{i}.q_norm": (d // heads,),
                f"{i}.k_norm": (d // heads,),
                **{f"{i}.{name}.w": (d, d) for name in ("q", "k", "v", "proj")},
                **{f"{i}.{name}.b": (d,) for name in ("q", "k", "v", "proj")},
                f"{i}.fc1.w": (4 * d, d),
                f"{i}.fc1.b": (4 * d,),
                f"{i}.fc2.w": (d, 4 * d),
                f"{i}.fc2.b": (d,),
                f"{i}.ada.w": (6 * d, d),
                f"{i}.ada.b": (6 * d,),
            }
        shapes |= {"norm": (d,), "ada.w": (2 * d, d), "ada.b": (2 * d,), "out.w": (values, d), "out.b": (values,)}
        self.w = {}
        for name, shape in shapes.items():
            drawn = generator.normal(size=shape, scale=0.2) + ("norm" in name)
            self.w[name] = torch.from_numpy(drawn).requires_grad_()

    def linear(self, x, name):
        return self.torch.nn.functional.linear(x, self.w[f"{name}.w"], self.w[f"{name}.b"])

    def __call__(self, clean, noised, step, label):
        """clean, noised [B, L, P]; step [B, N] in 0 .. 999; label int [B]. What is predicted of the noised ones."""
        torch, functional = self.torch, self.torch.nn.functional
        condition = self.linear(functional.silu(self.linear(sinusoids(torch, step), "t0")), "t2")
        condition = condition + self.w["y"][label][:, None]
        condition = functional.silu(condition).repeat_interleave(self.size, dim=1)  # a vector for each noised token
        x_clean, x_noised = (functional.linear(x, self.w["x"]) for x in (clean, noised))
        for i in range(self.depth):
            x_clean, x_noised = self.block(i, x_clean, x_noised, condition)
        shift, scale = self.linear(condition, "ada").chunk(2, dim=-1)
        return self.linear(normed(x_noised, self.w["norm"]) * (1 + scale) + shift, "out")

    def block(self, i, x_clean, x_noised, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.linear(condition, f"{i}.ada").chunk(6, dim=-1)
        h_clean = normed(x_clean, self.w[f"{i}.norm1"])
        h_noised = normed(x_noised, self.w[f"{i}.norm1"]) * (1 + scale1) + shift1
        seen = self.attention(i, self.torch.cat([h_clean, h_noised], dim=1))
        x_clean = x_clean + seen[:, : x_clean.shape[1]]
        x_noised = x_noised + gate1 * seen[:, x_clean.shape[1] :]
        x_clean = x_clean + self.mlp(i, normed(x_clean, self.w[f"{i}.norm2"]))
        h_noised = normed(x_noised, self.w[f"{i}.norm2"]) * (1 + scale2) + shift2
        return x_clean, x_noised + gate2 * self.mlp(i, h_noised)

    def attention(self, i, h):
        torch = self.torch
        b, s, d = h.shape
        q, k, v = (
            self.linear(h, f"{i}.{name}").reshape(b, s, self.heads, -1).transpose(1, 2) for name in ("q", "k", "v")
        )
        q, k = normed(q, self.w[f"{i}.q_norm"]), normed(k, self.w[f"{i}.k_norm"])
        q, k = (turn(x, [*self.at, *self.at], self.kind) for x in (q, k))
        logits = (q @ k.transpose(-1, -2)) / math.sqrt(d // self.heads)
        weights = logits.masked_fill(~mask(torch, self.blocks, self.size), -torch.inf).softmax(-1)
        return self.linear((weights @ v).transpose(1, 2).reshape(b, s, d), f"{i}.proj")

    def mlp(self, i, h):
        gelu = self.torch.nn.functional.gelu
        return self.linear(gelu(self.linear(h, f"{i}.fc1"), approximate="tanh"), f"{i}.fc2")

    def loss(self, clean, noise, step, label):
        """ε-prediction of a DDPM whose β goes evenly from 1e-4 to 0.02 in 1000 steps, mean over all values."""
        torch = self.torch
        kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[step.long()]
        kept = kept.repeat_interleave(self.size, dim=1)[..., None]
        noised = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        return torch.nn.functional.mse_loss(self(clean, noised, step, label), noise)
