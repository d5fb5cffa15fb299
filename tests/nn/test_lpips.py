"""LPIPS against the same network in PyTorch's functions and against torchmetrics, and what must hold of any distance.

The `lpips` package needs torchvision, which does not go with every PyTorch. torchmetrics holds a copy of its code and
heads; only the empty backbone is asked of torchvision, and made here instead. Compared by hand with a stand-in for
torchvision, `lpips` 0.1.4 itself with its own heads agrees as well: to 1.2e-7 of the distance for both backbones.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax.errors import UserError
from ddt_jax.io import torch_file
from ddt_jax.nn import lpips

VGG_CONVS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512}
VGG_CONVS[28] = 512
ALEX_CONVS = {0: (64, 11), 3: (192, 5), 6: (384, 3), 8: (256, 3), 10: (256, 3)}
TAPS = {"vgg16": (64, 128, 256, 512, 512), "alexnet": (64, 192, 384, 256, 256)}


@functools.cache
def weights(backbone):
    """Random weights in PyTorch's layout, scaled so that features neither vanish nor grow."""
    rng = np.random.default_rng(0)
    convs = ALEX_CONVS if backbone == "alexnet" else {i: (c, 3) for i, c in VGG_CONVS.items()}
    features, inputs = {"classifier.0.weight": np.zeros((2, 2), np.float32)}, 3
    for i, (outputs, size) in convs.items():
        scale = np.sqrt(2 / (inputs * size**2))
        kernel = rng.standard_normal((outputs, inputs, size, size), np.float32) * np.float32(scale)
        features |= {f"features.{i}.weight": kernel, f"features.{i}.bias": rng.normal(0, 0.1, outputs)}
        inputs = outputs
    heads = {f"lin{i}.model.1.weight": rng.uniform(0, 1, (1, c, 1, 1)) for i, c in enumerate(TAPS[backbone])}
    return [{k: v.astype(np.float32) for k, v in part.items()} for part in (features, heads)]


def images(size, n=2):
    rng = np.random.default_rng(1)
    a = rng.uniform(-1, 1, (n, size, size, 3)).astype(np.float32)
    return a, np.clip(a + rng.normal(0, 0.3, a.shape), -1, 1).astype(np.float32)


def torch_lpips(torch, backbone, a, b):
    """The reference: channels first, layer by layer as torchvision numbers them."""
    functional = torch.nn.functional
    features, heads = ({k: torch.tensor(v, dtype=a.dtype) for k, v in p.items()} for p in weights(backbone))

    def run(x):
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]], dtype=x.dtype)[..., None, None]
        x = (x - shift) / scale
        if backbone == "alexnet":
            pools, tapped, width = (2, 5), (1, 4, 7, 9, 11), 3
        else:
            pools, tapped, width = (4, 9, 16, 23), (3, 8, 15, 22, 29), 2
        found = []
        for i in range(tapped[-1] + 1):
            if i in pools:
                x = functional.max_pool2d(x, width, 2)
            elif f"features.{i}.weight" in features:
                stride, padding = (4, 2) if backbone == "alexnet" and i == 0 else (1, 1)
                padding = 2 if backbone == "alexnet" and i == 3 else padding
                x = functional.conv2d(
                    x, features[f"features.{i}.weight"], features[f"features.{i}.bias"], stride, padding
                )
            else:
                x = functional.relu(x)
            found += [x] if i in tapped else []
        return found

    total = 0
    for i, (x, y) in enumerate(zip(run(a), run(b), strict=True)):
        x, y = (v / (torch.sqrt(torch.sum(v**2, dim=1, keepdim=True)) + 1e-10) for v in (x, y))
        total = total + functional.conv2d((x - y) ** 2, heads[f"lin{i}.model.1.weight"]).mean((2, 3))
    return total[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["vgg16", "alexnet"])
def test_equals_pytorch_forwards_and_backwards(tmp_path, oracle, backbone):
    torch = oracle("torch")
    a, b = images(67 if backbone == "alexnet" else 35)  # odd: pools and strides leave a rest
    paths = tmp_path / "backbone.pth", tmp_path / "heads.pth"
    for path, part in zip(paths, weights(backbone), strict=True):
        torch.save({k: torch.tensor(v) for k, v in part.items()}, path)
    params = lpips.load(backbone, *paths)

    @jax.jit
    def run(params, a, b):
        distance, pull = jax.vjp(lambda a: lpips.distance(params, a, b, backbone=backbone), a)
        return distance, pull(jnp.array([1.0, 2.0], a.dtype))[0]

    def reference(dtype):
        a_torch, b_torch = (torch.tensor(x.transpose(0, 3, 1, 2), dtype=dtype) for x in (a, b))
        a_torch.requires_grad_()
        distance = torch_lpips(torch, backbone, a_torch, b_torch)
        (distance * torch.tensor([1.0, 2.0], dtype=dtype)).sum().backward()
        return distance.detach().numpy(), a_torch.grad.numpy().transpose(0, 2, 3, 1)

    def error(got, expected):
        return np.linalg.norm(got - expected) / np.linalg.norm(expected)

    # fp32 sums in another order; a rectifier that flips at 0 moves the gradient more, and in fp64 none does.
    single = [error(x, y) for x, y in zip(run(params, a, b), reference(torch.float32), strict=True)]
    with jax.enable_x64(True):
        found = run(params, *map(np.float64, (a, b)))
        double = [error(x, y) for x, y in zip(found, reference(torch.float64), strict=True)]
    print(f"{backbone}, distance and gradient: fp32 {single}, fp64 {double}")
    assert single[0] < 1e-5 and single[1] < 1e-4 and max(double) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["vgg16", "alexnet"])
def test_equals_torchmetrics_with_the_published_heads(tmp_path, monkeypatch, oracle, backbone):
    torch, tool = oracle("torch"), oracle("torchmetrics.functional.image.lpips")
    features, _ = weights(backbone)

    def empty(net, pretrained):
        """torchvision's `features`: module i where its state dict has features.i, rectifiers and pools between."""
        assert net == backbone and not pretrained
        modules = {i: torch.nn.ReLU() for i in range(30)}
        pools = {2: 3, 5: 3} if backbone == "alexnet" else dict.fromkeys((4, 9, 16, 23), 2)
        modules |= {i: torch.nn.MaxPool2d(width, 2) for i, width in pools.items()}
        for i in ALEX_CONVS if backbone == "alexnet" else VGG_CONVS:
            outputs, inputs, size, _ = features[f"features.{i}.weight"].shape
            first = backbone == "alexnet" and i == 0
            modules[i] = torch.nn.Conv2d(inputs, outputs, size, 4 if first else 1, 2 if size > 3 else 1)
            modules[i].load_state_dict({p: torch.tensor(features[f"features.{i}.{p}"]) for p in ("weight", "bias")})
        return torch.nn.Sequential(*modules.values())

    monkeypatch.setattr(tool, "_get_tv_model_features", empty)
    short = {"vgg16": "vgg", "alexnet": "alex"}[backbone]
    network = tool._LPIPS(pretrained=True, net=short, pnet_rand=True)
    heads = Path(tool.__file__).parent / "lpips_models" / f"{short}.pth"
    torch_file.save(tmp_path / "backbone.pth", features)
    params = lpips.load(backbone, tmp_path / "backbone.pth", heads)
    a, b = images(64)
    with torch.no_grad():
        expected = network(*(torch.tensor(x.transpose(0, 3, 1, 2)) for x in (a, b))).flatten().numpy()
    found = jax.jit(functools.partial(lpips.distance, backbone=backbone))(params, a, b)
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # fp32 sums in another order


def test_equal_images_are_at_distance_zero_and_it_is_symmetric():
    params = lpips.from_torch("alexnet", *weights("alexnet"))
    a, b = images(31)
    jitted = jax.jit(functools.partial(lpips.distance, backbone="alexnet"))
    assert np.asarray(jitted(params, a, a)).max() < 1e-9  # the compiler may round the two in different ways
    forth, back = np.asarray(jitted(params, a, b)), np.asarray(jitted(params, b, a))
    assert np.all(forth > 0.01) and forth.shape == (2,)
    np.testing.assert_allclose(forth, back, rtol=1e-5)


def test_gradient_is_finite_where_all_features_are_zero():
    """Rectified features often are all 0; the root in their length would make the gradient NaN."""
    x = jnp.array([[[[0.0, 0.0], [3.0, 4.0]]]])
    np.testing.assert_allclose(lpips._unit(x), x / 5, rtol=1e-6)
    gradient = np.asarray(jax.grad(lambda x: (lpips._unit(x) * jnp.array([1.0, 2.0])).sum())(x))
    assert np.all(np.isfinite(gradient))
    np.testing.assert_allclose(gradient[0, 0, 1], [(16 - 2 * 12) / 125, (2 * 9 - 12) / 125], rtol=1e-5)


def test_half_precision_images_are_judged_in_float32():
    params = lpips.from_torch("alexnet", *weights("alexnet"))
    got = jax.eval_shape(
        lambda a: lpips.distance(params, a, a, backbone="alexnet"), jnp.zeros((1, 31, 31, 3), jnp.bfloat16)
    )
    assert got.dtype == jnp.float32 and got.shape == (1,)


def test_wrong_weights_are_named_in_one_line(tmp_path):
    features, heads = weights("alexnet")
    for part, key, value in [
        (0, "features.3.weight", None),
        (0, "features.6.bias", np.zeros(3, np.float32)),
        (1, "lin2.model.1.weight", None),
        (1, "lin4.model.1.weight", np.zeros((1, 256, 1, 1), np.int32)),
    ]:
        parts = [dict(features), dict(heads)]
        parts[part] |= {key: value}
        parts[part] = {k: v for k, v in parts[part].items() if v is not None}
        paths = [tmp_path / "backbone.pth", tmp_path / "heads.pth"]
        for path, tree in zip(paths, parts, strict=True):
            torch_file.save(path, tree)
        with pytest.raises(UserError, match=key) as caught:
            lpips.load("alexnet", *paths)
        assert str(paths[part]) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="features.2.weight"):  # the other backbone's file
        lpips.from_torch(
            "vgg16",
            {"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)} | {"features.0.bias": np.zeros(64)},
            heads,
        )


def test_images_that_do_not_fit_are_refused():
    params = lpips.from_torch("alexnet", *weights("alexnet"))
    for shape, other in [((1, 30, 40, 3), None), ((1, 40, 40, 1), None), ((1, 40, 40, 3), (2, 40, 40, 3))]:
        with pytest.raises(ValueError, match="LPIPS"):
            lpips.distance(params, jnp.zeros(shape), jnp.zeros(other or shape), backbone="alexnet")
    with pytest.raises(ValueError, match="vgg16, alexnet"):
        lpips.distance(params, jnp.zeros((1, 40, 40, 3)), jnp.zeros((1, 40, 40, 3)), backbone="resnet")
