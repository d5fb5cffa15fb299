"""The published Selftok networks in plain PyTorch, to compare with: written from the description of their parts.

Functions of a dict of tensors under the names that published checkpoints use. `torch` is an argument, so that tests
without it can import this file.

Legend: B batch, N patches, K tokens, S = K + N, D width, H heads, E head dimension; h, w rows and columns of patches.
"""

import math

import numpy as np


def linear(torch, w, name, x):
    return torch.nn.functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(torch, x):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def mlp(torch, w, name, x):
    return linear(
        torch, w, f"{name}.fc2", torch.nn.functional.gelu(linear(torch, w, f"{name}.fc1", x), approximate="tanh")
    )


def split_heads(x_BSD, parts, heads):
    """[B, S, parts D] → parts of [B, H, S, E]; the packed order is (part, head, entry)."""
    b, s, width = x_BSD.shape
    return x_BSD.reshape(b, s, parts, heads, width // (parts * heads)).permute(2, 0, 3, 1, 4).unbind(0)


def attention(torch, q, k, v, mask=None):
    """[B, H, S, E] → [B, S, D]. mask: bool, broadcast to [B, H, S, T]."""
    logits = torch.einsum("bhse,bhte->bhst", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    out = torch.einsum("bhst,bhte->bhse", torch.softmax(logits, dim=-1), v)
    return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)


def sinusoids(torch, position, width=256):
    """cos then sin in fp32; the frequencies are rounded from fp64, where the last bit of exp is nobody's choice."""
    half = width // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half).float()
    angle = position.float()[..., None] * frequency
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


def embedder(torch, w, name, features):
    return linear(torch, w, f"{name}.mlp.2", torch.nn.functional.silu(linear(torch, w, f"{name}.mlp.0", features)))


def modulation(torch, w, name, condition, parts):
    return linear(torch, w, f"{name}.adaLN_modulation.1", torch.nn.functional.silu(condition)).chunk(parts, dim=-1)


def sincos(torch, position, width):
    """Fixed table: sin then cos."""
    frequency = 1 / 10000 ** (torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = position.double()[..., None] * frequency
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)


def sincos_2d(torch, side, width):
    """[side, side, width]: column first, then row."""
    line = sincos(torch, torch.arange(side), width // 2)
    column, row = line[None].expand(side, side, -1), line[:, None].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).float()


def crop(table, h, w):
    side = table.shape[0]
    top, left = (side - h) // 2, (side - w) // 2
    return table[top : top + h, left : left + w].flatten(0, 1)


def patches(torch, w, name, z_BCHW):
    x = torch.nn.functional.conv2d(z_BCHW, w[f"{name}.proj.weight"], w[f"{name}.proj.bias"], stride=2)
    return x.flatten(2).transpose(1, 2), x.shape[2:]


def positions(torch, num_tokens):
    return 1000 + 8 * torch.arange(num_tokens)


def encoder(torch, w, z_BCHW, *, depth, image_heads, heads, side, position=None):
    """Latent → features [B, K, d] before quantisation. position: of the tokens, [K]; the published ones if None."""
    x, (h, width) = patches(torch, w, "encoder.x_embedder", z_BCHW)
    x = x + crop(sincos_2d(torch, side, x.shape[-1]), h, width)
    q = w["encoder.query_tokens"].expand(x.shape[0], -1, -1)
    features = sinusoids(torch, positions(torch, q.shape[1]) if position is None else position)
    for i in range(depth):
        block = f"encoder.blocks.{i}"
        mod = modulation(torch, w, block, embedder(torch, w, f"{block}.t_embedder", features), 6)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = mod
        hx = norm(torch, x)
        hq = norm(torch, q) * (1 + scale_msa) + shift_msa
        image_k, image_v = split_heads(linear(torch, w, f"{block}.attn.to_query_kv", hx), 2, heads)
        query, k, v = split_heads(linear(torch, w, f"{block}.attn.query_linear", hq), 3, heads)
        out = attention(torch, query, torch.cat([image_k, k], dim=2), torch.cat([image_v, v], dim=2))
        q = q + gate_msa * linear(torch, w, f"{block}.attn.query_proj", out)
        q = q + gate_mlp * mlp(torch, w, f"{block}.q_mlp", norm(torch, q) * (1 + scale_mlp) + shift_mlp)
        out = attention(torch, *split_heads(linear(torch, w, f"{block}.attn.qkv", hx), 3, image_heads))
        x = x + linear(torch, w, f"{block}.attn.proj", out)
        x = x + mlp(torch, w, f"{block}.mlp", norm(torch, x))
    return linear(torch, w, "encoder.quantizer.project_in", q)


def decoder(torch, w, x_BCHW, t_B, codes_BKd, end_B, *, depth, heads, see_xt, renderer=False, position=None):
    """Unit codes → velocity, or x0 of the renderer, [B, C, H, W]. Tokens [0, end) are visible.

    x_BCHW: of the renderer only its shape is used. position: of the tokens, [K]; the published ones if None.
    """
    b, channels, height, columns = x_BCHW.shape
    rows, cols, num_tokens = height // 2, columns // 2, codes_BKd.shape[1]
    position = positions(torch, num_tokens) if position is None else position
    if renderer:
        x, t_B = w["model.mask_token"] + w["model.positional_embedding"], torch.ones_like(t_B)
        x = x.expand(b, -1, -1)
        end_B = torch.full_like(end_B, num_tokens)
    else:
        x, _ = patches(torch, w, "model.x_embedder", x_BCHW)
    side = math.isqrt(w["model.pos_embed"].shape[1])
    x = x + crop(w["model.pos_embed"].reshape(side, side, -1), rows, cols)
    shown = torch.arange(num_tokens) < end_B[:, None]
    codes = torch.nn.functional.layer_norm(
        codes_BKd,
        codes_BKd.shape[-1:],
        w["encoder.final_layer_norm3.weight"],
        w["encoder.final_layer_norm3.bias"],
        1e-6,
    )
    c = linear(torch, w, "model.context_embedder", codes * shown[..., None])
    c = c + sincos(torch, position, c.shape[-1]).float()
    time = embedder(torch, w, "model.t_embedder", sinusoids(torch, 1000 * t_B))[:, None]
    features = sinusoids(torch, position)
    to_tokens = torch.cat([shown, torch.full((b, rows * cols), see_xt)], dim=1)[:, None, None]
    to_patches = torch.cat([shown, torch.ones(b, rows * cols, dtype=torch.bool)], dim=1)[:, None, None]

    def finish(block, x, out, mod):
        x = x + mod[2] * linear(torch, w, f"{block}.attn.proj", out)
        return x + mod[5] * mlp(torch, w, f"{block}.mlp", norm(torch, x) * (1 + mod[4]) + mod[3])

    for i in range(depth):
        cb, xb, last = f"model.joint_blocks.{i}.context_block", f"model.joint_blocks.{i}.x_block", i == depth - 1
        place = embedder(torch, w, f"{cb}.t_embedder", features)
        cm = modulation(torch, w, cb, time if last else place, 2 if last else 6)
        xm = modulation(torch, w, xb, time, 6)
        cq, ck, cv = split_heads(linear(torch, w, f"{cb}.attn.qkv", norm(torch, c) * (1 + cm[1]) + cm[0]), 3, heads)
        xq, xk, xv = split_heads(linear(torch, w, f"{xb}.attn.qkv", norm(torch, x) * (1 + xm[1]) + xm[0]), 3, heads)
        k, v = torch.cat([ck, xk], dim=2), torch.cat([cv, xv], dim=2)
        if not last:
            c_out = attention(torch, cq, k, v, to_tokens)
        x = finish(xb, x, attention(torch, xq, k, v, to_patches), xm)
        if not last:
            c = finish(cb, c, c_out, cm)
    shift, scale = modulation(torch, w, "model.final_layer", time, 2)
    x = linear(torch, w, "model.final_layer.linear", norm(torch, x) * (1 + scale) + shift)
    return torch.einsum("nhwpqc->nchpwq", x.reshape(b, rows, cols, 2, 2, channels)).reshape(x_BCHW.shape)


def published_names(network):
    """Parameters (or gradients) of our network, unrolled, NumPy → the published layout, as far as it is computed with.

    Tables that are fixed are left out: the reference makes its own.
    """
    found = {}
    encoder, decoder = network["encoder"], network["decoder"]

    def dense(name, p):
        outputs = p["bias"].size
        found[f"{name}.weight"] = p["kernel"].reshape(-1, outputs).T
        found[f"{name}.bias"] = p["bias"].reshape(-1)

    def heads(name, p):  # [D, H, parts, E] → (part, head, entry)
        kernel, bias = p["heads"]["kernel"], p["heads"]["bias"]
        found[f"{name}.weight"] = kernel.transpose(2, 1, 3, 0).reshape(bias.size, -1)
        found[f"{name}.bias"] = bias.transpose(1, 0, 2).reshape(-1)

    def pair(name, p, first, second):
        dense(f"{name}.{first}", p["up"])
        dense(f"{name}.{second}", p["down"])

    def convolution(name, p):
        size = p["kernel"].shape[0] // 4
        found[f"{name}.proj.weight"] = p["kernel"].reshape(2, 2, size, -1).transpose(3, 2, 0, 1)
        found[f"{name}.proj.bias"] = p["bias"]

    convolution("encoder.x_embedder", encoder["embed"])
    found["encoder.query_tokens"] = encoder["queries"][None]
    dense("encoder.quantizer.project_in", encoder["to_code"])
    found["encoder.final_layer_norm3.weight"] = network["code_norm"]["scale"]
    found["encoder.final_layer_norm3.bias"] = network["code_norm"]["bias"]
    for i, p in enumerate([*encoder["blocks"].values(), encoder["last_block"]]):
        name = f"encoder.blocks.{i}"
        pair(f"{name}.t_embedder.mlp", p["position"], 0, 2)
        dense(f"{name}.adaLN_modulation.1", p["adaln"]["modulate"])
        heads(f"{name}.attn.qkv", p["image_project"])
        heads(f"{name}.attn.to_query_kv", p["image_to_query"])
        heads(f"{name}.attn.query_linear", p["query_project"])
        dense(f"{name}.attn.proj", p["image_output"]["merge"])
        dense(f"{name}.attn.query_proj", p["query_output"]["merge"])
        pair(f"{name}.mlp", p["image_mlp"], "fc1", "fc2")
        pair(f"{name}.q_mlp", p["query_mlp"], "fc1", "fc2")

    if "embed" in decoder:
        convolution("model.x_embedder", decoder["embed"])
    else:
        found["model.mask_token"] = decoder["mask_token"][None]
        found["model.positional_embedding"] = decoder["canvas_positions"]
    dense("model.context_embedder", decoder["token_embed"])
    pair("model.t_embedder.mlp", decoder["time"], 0, 2)
    dense("model.final_layer.linear", decoder["final"])
    dense("model.final_layer.adaLN_modulation.1", decoder["final_adaln"]["modulate"])
    for i, p in enumerate([*decoder["blocks"].values(), decoder["last_block"]]):
        context, image = f"model.joint_blocks.{i}.context_block", f"model.joint_blocks.{i}.x_block"
        joint = p["joint"]
        pair(f"{context}.t_embedder.mlp", p["position"], 0, 2)
        for name, prefix in ((context, "token_"), (image, "")):
            dense(f"{name}.adaLN_modulation.1", joint[f"{prefix}adaln"]["modulate"])
            heads(f"{name}.attn.qkv", joint[f"{prefix}project"])
            if f"{prefix}output" in joint:
                dense(f"{name}.attn.proj", joint[f"{prefix}output"]["merge"])
                pair(f"{name}.mlp", joint[f"{prefix}mlp"], "fc1", "fc2")
        if "token_query" in p:  # the published tensor holds all three
            for kind in ("weight", "bias"):
                rest = found[f"{context}.attn.qkv.{kind}"]
                heads("query", p["token_query"])
                found[f"{context}.attn.qkv.{kind}"] = np.concatenate([found[f"query.{kind}"], rest])
    found.pop("query.weight"), found.pop("query.bias")
    found["model.pos_embed"] = decoder["positions"].reshape(1, -1, decoder["positions"].shape[-1])
    return found
