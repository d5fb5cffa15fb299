"""An image tokenizer in plain PyTorch: images to a short sequence of codes, and codes back to images.

`ddt-jax export torch` wrote this file beside `config.json` and `model.safetensors`. It needs PyTorch 2.1 or later and
nothing else:

    import tokenizer

    model = tokenizer.load("DIR", device="cuda")
    codes = model.encode(images)            # [B, 3, H, W] in [-1, 1] → int64 [B, K]
    images = model.decode(codes, steps=25)  # or model.render(codes), where the decoder is a one-step renderer

The decoder is a flow. It starts with noise, at noise level t = 1, and follows a velocity to an image, at t = 0; in
between it sees some of the tokens only, as `visible_count` says. Everything runs in float32.

Networks are functions of `p`, a tree of modules that hold weights and have no `forward`; so `model.state_dict()`,
`.to()` and `.parameters()` work as ever.

Legend: B batch, N patches, P values of a patch, K tokens, d code dimension, D width, H heads, E head dimension, S rows
of the attention; u is the time before it is shifted, t the noise level.
"""

import json
import math
import mmap
import os

import torch
import torch.nn.functional as F
from torch import nn

FORMAT = 1
EPS = 1e-6
SINUSOIDS = 256  # of a place or time, in the published networks
SMALLEST = 1e-3  # of a divisor, where a prediction is turned into a velocity


def load(folder=None, device="cpu"):
    """The tokenizer in a folder; None: in the one of this file.

    Weights are mapped from the file and taken as they are: none is allocated or initialised before.
    """
    with torch.device("meta"):
        model = build(folder)
    model.load_state_dict(read_safetensors(_path(folder, "model.safetensors")), assign=True)
    return model.to(device)


def build(folder=None):
    """The tokenizer in a folder with memory for its weights, which hold anything.

    Under `with torch.device("meta")` they have no memory either, only shapes. `load_state_dict(tensors, assign=True)`
    then takes tensors from wherever they are.
    """
    with open(_path(folder, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    if config["format"] != FORMAT:
        where = os.path.dirname(_path(folder, "config.json"))
        raise ValueError(f"{where} has format {config['format']}, this file reads {FORMAT}: take the one beside it")
    with open(_path(folder, "model.safetensors"), "rb") as file:
        entries, _ = _header(file)
    return Tokenizer(config, {name: entry["shape"] for name, entry in entries.items()}).eval()


def read_safetensors(path):
    """Name → float32 tensor; the file is mapped, not copied."""
    with open(path, "rb") as file:
        entries, start = _header(file)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, entry in entries.items():
        if entry["dtype"] != "F32":
            raise ValueError(f"{path}: {name} is of type {entry['dtype']}, not F32")
        shape, offset = entry["shape"], start + entry["data_offsets"][0]
        tensors[name] = torch.frombuffer(data, dtype=torch.float32, count=math.prod(shape), offset=offset).view(shape)
    return tensors


def _path(folder, name):
    return os.path.join(os.path.dirname(os.path.abspath(__file__)) if folder is None else folder, name)


def _header(file):
    """Name → entry of the tensors in an open safetensors file, and where their bytes begin."""
    size = int.from_bytes(file.read(8), "little")
    entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return entries, 8 + size


class Tokenizer(nn.Module):
    """What `load` returns.

    Args:
      config: of the file `config.json`.
      shapes: of the weights, by name.

    Attributes:
      config: settings of the model.
      num_tokens: K.
      codebook_size: codes are 0..codebook_size - 1.
      image_size: height and width of the images.
      latent_shape: of what `decode` starts from, for one image.
      one_step: whether the decoder is a renderer.
    """

    def __init__(self, config, shapes):
        super().__init__()
        m = self.config = config["model"]
        for name, shape in shapes.items():
            *path, last = name.split(".")
            node = self
            for step in path:
                if not hasattr(node, step):
                    node.add_module(step, nn.Module())
                node = getattr(node, step)
            node.register_parameter(last, nn.Parameter(torch.empty(shape, dtype=torch.float32)))
        self.image_size, self.num_tokens = config["image_size"], m["num_tokens"]
        self.codebook_size, self.code_dim = self.codebook.shape
        self.latents = m["codec"].get("sizes")  # None: of pixels
        down = 2 ** (len(self.latents["block_out_channels"]) - 1) if self.latents else 1
        channels, side = self.latents["latent_channels"] if self.latents else 3, self.image_size // down
        self.latent_shape = channels, side, side
        self.published = m["kind"] == "selftok"
        self.one_step = m["decoder"]["kind"] == "renderer"

    @torch.no_grad()
    def encode(self, images):
        """Codes int64 [B, K] of images [B, 3, H, W] in [-1, 1]."""
        z = images.to(self.codebook)
        if self.latents:
            z = latents_of(self.codec, self.latents, z)
        network = published_encoder if self.published else encoder
        z = network(self.encoder, self.config, patchify(z, self.config["patch_size"]))
        if self.config["quantizer"]["normalize_input"] == "batch":
            z = (z - self.feature_mean) / torch.sqrt(self.feature_var + 1e-5)
        z = F.normalize(z, dim=-1)
        # One image at a time: the similarities of a batch to all codes can be very many.
        return torch.stack([(z_Kd @ self.codebook.T).argmax(-1) for z_Kd in z])

    @torch.no_grad()
    def decode(self, codes, steps=None, *, noise=None, seed=0, num_visible=None, guidance=None, solver=None):
        """Images [B, 3, H, W] in [-1, 1] from codes [B, K], drawn by the flow.

        Args:
          steps: of the solver. None: as in the settings it was trained with; so for guidance and solver.
          noise: standard normal [B, *latent_shape] to start from; None: drawn with the seed.
          num_visible: only so many of the coarsest tokens are ever shown, a number or one per image [B]; None: all.
          guidance: 1 shows the tokens, 0 hides them all, more than 1 exaggerates what they say.
          solver: "euler", "heun" or "dpmpp_2m".
        """
        if self.one_step:
            raise ValueError("this tokenizer has a one-step renderer: use render(codes)")
        m, flow, device, b = self.config, self.config["flow"], self.codebook.device, len(codes)
        if noise is None:
            noise = torch.randn(b, *self.latent_shape, generator=torch.Generator().manual_seed(seed))
        guidance = flow["guidance"] if guidance is None else guidance
        vectors = self._vectors(codes)
        # Times and counts are made on the CPU, where they are rounded as in training.
        u = torch.linspace(1, 0, (steps or flow["solver_steps"]) + 1)
        t = flow["shift"] * u / (1 + (flow["shift"] - 1) * u)
        shown = visible_count(m["schedule"], self.num_tokens, u, getattr(self, "token_appears", None)).tolist()

        def velocity(x, i):
            t_B = t[i].to(device).expand(b)
            start, end = self._visible(shown[i], b, num_visible)
            network = published_decoder if self.published else decoder

            def at(end):
                return to_velocity(flow["prediction"], network(self.decoder, m, x, t_B, vectors, start, end), x, t[i])

            if guidance in (0, 1):
                return at(end if guidance == 1 else start)
            return (1 - guidance) * at(start) + guidance * at(end)

        x = patchify(noise.to(self.codebook), m["patch_size"])
        return self._images(integrate(velocity, x, t, solver or flow["solver"]))

    @torch.no_grad()
    def render(self, codes, *, num_visible=None):
        """Images [B, 3, H, W] in [-1, 1] from codes [B, K], by a one-step renderer. num_visible: as for `decode`."""
        if not self.one_step:
            raise ValueError("this tokenizer has a flow decoder: use decode(codes)")
        start, end = self._visible(self.num_tokens, len(codes), num_visible)
        t_B = torch.ones(len(codes), device=self.codebook.device)
        network = published_decoder if self.published else decoder
        return self._images(network(self.decoder, self.config, None, t_B, self._vectors(codes), start, end))

    def _visible(self, count, batch, limit):
        """Tokens [start, end) that are shown where `count` of them may be: two tensors [B]."""
        device = self.codebook.device
        end = torch.full((batch,), count, device=device)
        limit = torch.as_tensor(self.num_tokens if limit is None else limit, device=device).expand(batch)
        if self.config["schedule"]["direction"] == "coarse_first":
            return torch.zeros_like(end), torch.minimum(end, limit)
        start = (self.num_tokens - limit).clamp(min=0)
        return start, torch.maximum(start, end)

    def _vectors(self, codes):
        """[B, K, d]."""
        vectors = self.codebook[codes.to(self.codebook.device)]
        return affine_norm(self.code_norm, vectors) if self.published else math.sqrt(self.code_dim) * vectors

    def _images(self, x_BNP):
        z = unpatchify(x_BNP, self.config["patch_size"], self.latent_shape)
        return (images_of(self.codec, self.latents, z) if self.latents else z).clamp(-1, 1)


# Time.


def visible_count(schedule, num_tokens, u, appears):
    """How many tokens the decoder may see at times u in [0, 1], where 1 is noise: int64 like u.

    Direction "coarse_first": tokens 0..k(u), more of them as the noise falls; the first hold what is coarse.
    Direction "selftok": tokens 0..k(u), more of them as the noise rises; the last hold what is coarse.

    Args:
      appears: where each token appears on the way from 0 to 1, [K], for kinds that have a table (in thousandths for
        "piecewise").
    """
    progress = u if schedule["direction"] == "selftok" else 1 - u
    if schedule["groups"]:
        progress = progress + 2.0**-21  # u is rounded; a step that is due to start a group must not miss it
    if schedule["kind"] == "piecewise":
        last = (torch.floor(1000 * progress)[:, None] >= appears.cpu()[1:]).sum(-1)
    elif schedule["kind"] == "logit_normal":
        last = (progress[:, None] > appears.cpu()[1:]).sum(-1)
    elif schedule["kind"] == "timesteps":
        last = torch.ceil((progress - 2.0**-21) * num_tokens).long() - 1
    else:
        share = torch.tensor(1 - schedule["full_below"] if schedule["kind"] == "late" else 1.0)
        last = torch.floor((progress / share).clamp(max=1) * num_tokens).long()
    group = num_tokens // schedule["groups"] if schedule["groups"] else 1
    return (last.clamp(0, num_tokens - 1) // group + 1) * group


def to_velocity(kind, y, x, t):
    """The velocity, noise - image, that a prediction y at x implies."""
    if kind == "velocity":
        return y
    return (x - y) / max(float(t), SMALLEST) if kind == "x0" else (y - x) / max(1 - float(t), SMALLEST)


def integrate(velocity, x, t, solver):
    """x at t = 0. velocity: (x, i) → dx/dt at t[i]; t falls from 1 to 0.

    "heun" takes two evaluations per step, but for the last; "dpmpp_2m" is DPM-Solver++(2M), arXiv 2211.01095.
    """
    if solver not in ("euler", "heun", "dpmpp_2m"):
        raise ValueError(f"solver {solver!r} is none of euler, heun, dpmpp_2m")
    step = torch.diff(torch.log1p(-t) - torch.log(t))
    # Of first order: the first step, the one behind it (whose predecessor is infinitely long) and the last.
    ratio = [0.0, *torch.where(t[2:] > 0, step[1:] / (2 * step[:-1]), torch.zeros_like(t[2:])).tolist()]
    t, last = t.tolist(), torch.zeros_like(x)
    for i in range(len(t) - 1):
        now, then = t[i], t[i + 1]
        v = velocity(x, i)
        if solver == "dpmpp_2m":
            x0 = x - now * v
            towards = x0 + ratio[i] * (x0 - last)
            x, last = towards + then / now * (x - towards), x0
            continue
        if solver == "heun" and then > 0:
            v = (v + velocity(x + (then - now) * v, i + 1)) / 2
        x = x + (then - now) * v
    return x


# Layers.


def patchify(x_BCHW, size):
    """[B, N, P]: patches row by row, values as (row, column, channel)."""
    b, c, h, w = x_BCHW.shape
    x = x_BCHW.reshape(b, c, h // size, size, w // size, size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, size * size * c)


def unpatchify(x_BNP, size, shape):
    """The inverse, to [B, *shape]."""
    c, h, w = shape
    x = x_BNP.reshape(-1, h // size, w // size, size, size, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, c, h, w)


def sinusoids(position, width):
    """[...] → [..., width], cos then sin."""
    half = width // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half).float()
    angle = position[..., None] * frequency.to(position.device)
    return F.pad(torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1), (0, width % 2))


def place_features(num_tokens, device):
    """[1, K, SINUSOIDS] of the tokens' places, which stand as 1000, 1008, ..."""
    return sinusoids(1000.0 + 8 * torch.arange(num_tokens, device=device), SINUSOIDS)[None]


def linear(p, x):
    return F.linear(x, p.weight, getattr(p, "bias", None))


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def affine_norm(p, x):
    return F.layer_norm(x, x.shape[-1:], p.weight, p.bias, EPS)


def gelu(x):
    return F.gelu(x, approximate="tanh")


def mlp(p, x):
    return linear(p.down, gelu(linear(p.up, x)))


def embedder(p, features):
    """Of a time or a place."""
    return linear(p.down, F.silu(linear(p.up, features)))


def modulation(p, condition, parts):
    return linear(p, F.silu(condition)).chunk(parts, dim=-1)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def heads_of(p, x, heads, parts):
    """Queries, keys and values, or the last two, each [B, H, S, E]."""
    y = linear(p, x).unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if not hasattr(p, "qk_norm"):
        return y
    normed = [part * torch.rsqrt(part.square().mean(-1, keepdim=True) + EPS) for part in y[:-1]]
    return [*(part * p.qk_norm[i] for i, part in enumerate(normed)), y[-1]]


def attention(q, k, v, mask=None):
    """[B, H, S, E] → [B, S, D]. mask: bool [B, 1, 1, S], True where keys are visible; None: all are."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if mask is not None:
        out = torch.where(mask.any(-1, keepdim=True), out, torch.zeros_like(out))  # who sees nothing gets nothing
    return out.transpose(1, 2).flatten(2)


def masks(start, end, tokens, patches):
    """Tokens [start, end) as a mask [B, K] and, with the patches that follow, as one of keys [B, 1, 1, K + N]."""
    index = torch.arange(tokens, device=start.device)
    shown = (start[:, None] <= index) & (index < end[:, None])
    return shown, torch.cat([shown, shown.new_ones(len(start), patches)], dim=1)[:, None, None]


def numbered(p):
    """The children of a list of blocks, in order."""
    return [getattr(p, str(i)) for i in range(len(list(p.children())))]


def encoder_block(p, x, heads):
    """Self-attention and MLP."""
    x = x + linear(p.output, attention(*heads_of(p.project, affine_norm(p.attention_norm, x), heads, 3)))
    return x + mlp(p.mlp, affine_norm(p.mlp_norm, x))


def cross_block(p, x, tokens, condition, mask, heads):
    """Patches see each other and the tokens; tokens stay as they are."""
    mod = modulation(p.adaln, condition, 6)
    token_k, token_v = heads_of(p.token_project, tokens, heads, 2)
    q, k, v = heads_of(p.project, modulate(norm(x), mod[0], mod[1]), heads, 3)
    out = attention(q, torch.cat([token_k, k], dim=2), torch.cat([token_v, v], dim=2), mask)
    x = x + mod[2] * linear(p.output, out)
    return x + mod[5] * mlp(p.mlp, modulate(norm(x), mod[3], mod[4]))


def joint_block(p, tokens, x, token_condition, condition, mask, token_mask, heads):
    """Tokens and patches with weights of their own and one attention over both (MMDiT, arXiv 2403.03206).

    mask, token_mask: what the rows of patches and of tokens see. Behind the last block nothing reads the tokens.
    """
    last = not hasattr(p, "token_output")
    mod, token_mod = modulation(p.adaln, condition, 6), modulation(p.token_adaln, token_condition, 2 if last else 6)
    h = modulate(norm(tokens), token_mod[0], token_mod[1])
    *token_q, token_k, token_v = heads_of(p.token_project, h, heads, 2 if last else 3)
    q, k, v = heads_of(p.project, modulate(norm(x), mod[0], mod[1]), heads, 3)
    k, v = torch.cat([token_k, k], dim=2), torch.cat([token_v, v], dim=2)
    x = x + mod[2] * linear(p.output, attention(q, k, v, mask))
    x = x + mod[5] * mlp(p.mlp, modulate(norm(x), mod[3], mod[4]))
    if not last:
        tokens = tokens + token_mod[2] * linear(p.token_output, attention(token_q[0], k, v, token_mask))
        tokens = tokens + token_mod[5] * mlp(p.token_mlp, modulate(norm(tokens), token_mod[3], token_mod[4]))
    return tokens, x


# Networks. Encoders: patches [B, N, P] → features [B, K, d]. Decoders: noised patches, noise level, the tokens' vectors
# and which of them are shown → prediction [B, N, P].


def encoder(p, m, patches):
    b, n, _ = patches.shape
    x = torch.cat([linear(p.embed, patches) + p.positions, p.queries.expand(b, -1, -1)], dim=1)
    for block in numbered(p.blocks):
        x = encoder_block(block, x, m["heads"])
    x = affine_norm(p.norm, x)
    z = linear(p.to_code, x[:, n:])
    return z + linear(p.mix, x[:, :n].flatten(1)).view(z.shape) if m["mix"] else z


def decoder(p, m, patches, t, codes, start, end):
    shown, mask = masks(start, end, codes.shape[1], len(p.positions))
    codes = codes * shown[..., None]
    canvas = p.canvas if patches is None else linear(p.embed, patches)  # a renderer's, or noised patches
    x = (canvas + p.positions).expand(len(codes), -1, -1)
    if m["mix"]:
        x = x + linear(p.mix, codes.flatten(1)).view(x.shape)
    condition = embedder(p.time, sinusoids(1000 * t, x.shape[-1]))[:, None]
    tokens = linear(p.token_down, gelu(linear(p.token_up, codes))) + p.token_positions
    cross = m["coupling"] == "cross"
    tokens = affine_norm(p.token_norm, tokens) if cross else tokens
    for block in numbered(p.blocks):
        if cross:
            x = cross_block(block, x, tokens, condition, mask, m["heads"])
        else:
            tokens, x = joint_block(block, tokens, x, p.token_positions[None], condition, mask, mask, m["heads"])
    shift, scale = modulation(p.final_adaln, condition, 2)
    return linear(p.final, modulate(norm(x), shift, scale))


def published_encoder(p, m, patches):
    """Selftok (arXiv 2505.07538): queries see the image and each other, the image sees itself."""
    e = m["encoder"]
    x, queries = linear(p.embed, patches) + p.positions, p.queries.expand(len(patches), -1, -1)
    places = place_features(queries.shape[1], x.device)
    for block in numbered(p.blocks):
        mod, h = modulation(block.adaln, embedder(block.position, places), 6), norm(x)
        image_k, image_v = heads_of(block.image_to_query, h, e["heads"], 2)
        q, k, v = heads_of(block.query_project, modulate(norm(queries), mod[0], mod[1]), e["heads"], 3)
        out = attention(q, torch.cat([image_k, k], dim=2), torch.cat([image_v, v], dim=2))
        queries = queries + mod[2] * linear(block.query_output, out)
        queries = queries + mod[5] * mlp(block.query_mlp, modulate(norm(queries), mod[3], mod[4]))
        if hasattr(block, "image_project"):  # nothing reads the image that would come out of the last block
            x = x + linear(block.image_output, attention(*heads_of(block.image_project, h, e["image_heads"], 3)))
            x = x + mlp(block.image_mlp, norm(x))
    return linear(p.to_code, queries)


def published_decoder(p, m, patches, t, codes, start, end):
    """Selftok's MMDiT, or its one-step renderer: a learned canvas in the place of noised patches."""
    d, k = m["decoder"], codes.shape[1]
    shown, mask = masks(start, end, k, len(p.positions))
    sees = torch.arange(mask.shape[-1], device=mask.device) < k + len(p.positions) * d["context_see_xt"]
    tokens = linear(p.token_embed, codes * shown[..., None]) + p.token_positions
    if d["kind"] == "renderer":
        x = (p.mask_token + p.canvas_positions).expand(len(codes), -1, -1)
    else:
        x = linear(p.embed, patches)
    x = x + p.positions if d.get("canvas_keeps_table", True) else x
    condition = embedder(p.time, sinusoids(1000 * t, SINUSOIDS))[:, None]
    places = place_features(k, x.device)
    for block in numbered(p.blocks):
        # In the last block the time stands in for the place.
        place = embedder(block.position, places) if hasattr(block, "position") else condition
        tokens, x = joint_block(block, tokens, x, place, condition, mask, mask & sees, d["heads"])
    shift, scale = modulation(p.final_adaln, condition, 2)
    return linear(p.final, modulate(norm(x), shift, scale))


# Latents of a KL autoencoder. Its weights have the names of diffusers' AutoencoderKL.


def latents_of(p, sizes, images):
    """The mode of the posterior, brought to about unit scale."""
    x = convolve(p.encoder.conv_in, images)
    for level in numbered(p.encoder.down_blocks):
        x = residuals(numbered(level.resnets), x, sizes)
        if hasattr(level, "downsamplers"):
            x = convolve(getattr(level.downsamplers, "0").conv, F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
    x = convolve(p.encoder.conv_out, F.silu(group_norm(p.encoder.conv_norm_out, middle(p.encoder, x, sizes), sizes)))
    x = convolve(p.quant_conv, x, padding=0) if sizes["use_quant_conv"] else x
    return (x.chunk(2, dim=1)[0] - sizes["shift_factor"]) * sizes["scaling_factor"]


def images_of(p, sizes, latents):
    x = latents / sizes["scaling_factor"] + sizes["shift_factor"]
    x = convolve(p.post_quant_conv, x, padding=0) if sizes["use_quant_conv"] else x
    x = middle(p.decoder, convolve(p.decoder.conv_in, x), sizes)
    for level in numbered(p.decoder.up_blocks):
        x = residuals(numbered(level.resnets), x, sizes)
        if hasattr(level, "upsamplers"):
            x = convolve(getattr(level.upsamplers, "0").conv, F.interpolate(x, scale_factor=2.0, mode="nearest"))
    return convolve(p.decoder.conv_out, F.silu(group_norm(p.decoder.conv_norm_out, x, sizes)))


def convolve(p, x, stride=1, padding=1):
    return F.conv2d(x, p.weight, p.bias, stride, padding)


def group_norm(p, x, sizes):
    return F.group_norm(x, sizes["norm_groups"], p.weight, p.bias, EPS)


def residuals(blocks, x, sizes):
    for block in blocks:
        h = convolve(block.conv1, F.silu(group_norm(block.norm1, x, sizes)))
        h = convolve(block.conv2, F.silu(group_norm(block.norm2, h, sizes)))
        x = (convolve(block.conv_shortcut, x, padding=0) if hasattr(block, "conv_shortcut") else x) + h
    return x


def middle(p, x, sizes):
    """A residual block, attention of all pixels with one head, a residual block."""
    first, second = numbered(p.mid_block.resnets)
    x = residuals([first], x, sizes)
    a = getattr(p.mid_block.attentions, "0")
    h = group_norm(a.group_norm, x, sizes).flatten(2).transpose(1, 2)
    out = attention(*(linear(to, h)[:, None] for to in (a.to_q, a.to_k, a.to_v)))
    x = x + linear(getattr(a.to_out, "0"), out).transpose(1, 2).reshape(x.shape)
    return residuals([second], x, sizes)
