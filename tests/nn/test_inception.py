"""FID's Inception-v3 against the same network in PyTorch, written from its description layer by layer.

Packages that have the network need torchvision, which does not go with every PyTorch: none of them is an oracle here.
Compared by hand, with stand-ins for torchvision: torch-fidelity 0.4.0 from its own scaling of 299 pixels on agrees to
6.5e-7 of the largest feature. (It resizes and scales in another way than pytorch-fid, whom we follow.)
"""

import functools

import jax
import numpy as np
import pytest

from ddt_jax.errors import UserError
from ddt_jax.io import torch_file
from ddt_jax.nn import inception


class Reference:
    """The network in PyTorch's functions. Weights are drawn when a layer is first met, so that it lists them itself."""

    def __init__(self, torch):
        self.torch, self.f = torch, torch.nn.functional
        self.weights = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, key, shape, low, high):
        if key not in self.weights:
            self.weights[key] = low + (high - low) * self.torch.rand(shape, generator=self.generator)
        return self.weights[key]

    def conv(self, x, name, features, kernel=1, stride=1, padding=0):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        # A rectifier halves the power, so a variance of 2 / fan-in keeps it: a uniform of +- sqrt(6 / fan-in).
        bound = (6 / (x.shape[1] * kernel[0] * kernel[1])) ** 0.5
        weight = self.draw(f"{name}.conv.weight", (features, x.shape[1], *kernel), -bound, bound)
        scale, shift = self.draw(f"{name}.bn.weight", features, 0.7, 1.3), self.draw(f"{name}.bn.bias", features, -1, 1)
        mean = self.draw(f"{name}.bn.running_mean", features, -0.5, 0.5)
        variance = self.draw(f"{name}.bn.running_var", features, 0.5, 1.5)
        y = self.f.conv2d(x, weight.to(x.dtype), None, stride, padding)
        statistics = (v.to(x.dtype) for v in (mean, variance, scale, shift))
        return self.f.relu(self.f.batch_norm(y, *statistics, training=False, eps=0.001))

    def average(self, x):
        return self.f.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def a(self, x, n, pool):
        five = self.conv(self.conv(x, f"{n}.branch5x5_1", 48), f"{n}.branch5x5_2", 64, 5, padding=2)
        three = self.conv(self.conv(x, f"{n}.branch3x3dbl_1", 64), f"{n}.branch3x3dbl_2", 96, 3, padding=1)
        three = self.conv(three, f"{n}.branch3x3dbl_3", 96, 3, padding=1)
        pooled = self.conv(self.average(x), f"{n}.branch_pool", pool)
        return self.torch.cat([self.conv(x, f"{n}.branch1x1", 64), five, three, pooled], 1)

    def b(self, x, n):
        three = self.conv(x, f"{n}.branch3x3", 384, 3, 2)
        double = self.conv(self.conv(x, f"{n}.branch3x3dbl_1", 64), f"{n}.branch3x3dbl_2", 96, 3, padding=1)
        double = self.conv(double, f"{n}.branch3x3dbl_3", 96, 3, 2)
        return self.torch.cat([three, double, self.f.max_pool2d(x, 3, 2)], 1)

    def c(self, x, n, width):
        row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        seven = self.conv(self.conv(x, f"{n}.branch7x7_1", width), f"{n}.branch7x7_2", width, **row)
        seven = self.conv(seven, f"{n}.branch7x7_3", 192, **column)
        double = self.conv(self.conv(x, f"{n}.branch7x7dbl_1", width), f"{n}.branch7x7dbl_2", width, **column)
        double = self.conv(double, f"{n}.branch7x7dbl_3", width, **row)
        double = self.conv(double, f"{n}.branch7x7dbl_4", width, **column)
        double = self.conv(double, f"{n}.branch7x7dbl_5", 192, **row)
        pooled = self.conv(self.average(x), f"{n}.branch_pool", 192)
        return self.torch.cat([self.conv(x, f"{n}.branch1x1", 192), seven, double, pooled], 1)

    def d(self, x, n):
        three = self.conv(self.conv(x, f"{n}.branch3x3_1", 192), f"{n}.branch3x3_2", 320, 3, 2)
        seven = self.conv(x, f"{n}.branch7x7x3_1", 192)
        seven = self.conv(seven, f"{n}.branch7x7x3_2", 192, (1, 7), padding=(0, 3))
        seven = self.conv(seven, f"{n}.branch7x7x3_3", 192, (7, 1), padding=(3, 0))
        seven = self.conv(seven, f"{n}.branch7x7x3_4", 192, 3, 2)
        return self.torch.cat([three, seven, self.f.max_pool2d(x, 3, 2)], 1)

    def e(self, x, n, pooled):
        def both(x, name):
            row = self.conv(x, f"{name}a", 384, (1, 3), padding=(0, 1))
            return self.torch.cat([row, self.conv(x, f"{name}b", 384, (3, 1), padding=(1, 0))], 1)

        three = both(self.conv(x, f"{n}.branch3x3_1", 384), f"{n}.branch3x3_2")
        double = self.conv(self.conv(x, f"{n}.branch3x3dbl_1", 448), f"{n}.branch3x3dbl_2", 384, 3, padding=1)
        double = both(double, f"{n}.branch3x3dbl_3")
        pooled = self.conv(pooled, f"{n}.branch_pool", 192)
        return self.torch.cat([self.conv(x, f"{n}.branch1x1", 320), three, double, pooled], 1)

    def __call__(self, x):
        """x: [B, 3, H, W] in [0, 1]."""
        x = 2 * self.f.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1
        x = self.conv(self.conv(x, "Conv2d_1a_3x3", 32, 3, 2), "Conv2d_2a_3x3", 32, 3)
        x = self.f.max_pool2d(self.conv(x, "Conv2d_2b_3x3", 64, 3, padding=1), 3, 2)
        x = self.conv(self.conv(x, "Conv2d_3b_1x1", 80), "Conv2d_4a_3x3", 192, 3)
        x = self.f.max_pool2d(x, 3, 2)
        for letter, pool in zip("bcd", (32, 64, 64), strict=True):
            x = self.a(x, f"Mixed_5{letter}", pool)
        x = self.b(x, "Mixed_6a")
        for letter, width in zip("bcde", (128, 160, 160, 192), strict=True):
            x = self.c(x, f"Mixed_6{letter}", width)
        x = self.d(x, "Mixed_7a")
        x = self.e(x, "Mixed_7b", self.average(x))
        return self.e(x, "Mixed_7c", self.f.max_pool2d(x, 3, 1, 1)).mean((2, 3))


@functools.cache
def weights():
    """A state dict of the right shapes, zeros but for the factors: without PyTorch, and in no time."""
    found = {}

    def fill(prefix, chain, inputs):
        for step in chain:
            if isinstance(step, inception._Conv):
                key, zeros = prefix + step.name, np.zeros(step.features, np.float32)
                found[f"{key}.conv.weight"] = np.zeros((step.features, inputs, *step.kernel), np.float32)
                found.update({f"{key}.bn.{part}": zeros for part in ("bias", "running_mean")})
                found.update({f"{key}.bn.{part}": zeros + 1 for part in ("weight", "running_var")})
                inputs = step.features
            elif isinstance(step, tuple):
                inputs = sum(fill(prefix, branch, inputs) for branch in step)
        return inputs

    inputs = 3
    for prefix, chain in inception._CHAINS:
        inputs = fill(prefix, chain, inputs)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 320])  # enlarged, and shrunk
def test_equals_pytorch(tmp_path, oracle, size):
    torch = oracle("torch")
    reference = Reference(torch)
    image = np.random.default_rng(1).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    x = torch.tensor(image.transpose(0, 3, 1, 2))
    with torch.no_grad():
        single, double = reference(x / 255).numpy(), reference(x.double() / 255).numpy()
    torch.save(reference.weights, tmp_path / "fid.pth")
    params = inception.load(tmp_path / "fid.pth")
    run = jax.jit(inception.features)
    found = np.asarray(run(params, image))
    assert found.shape == (2, inception.FEATURES) and found.dtype == np.float32
    with jax.enable_x64(True):
        wide = {k: v.double().numpy() for k, v in reference.weights.items()}
        found_double = np.asarray(run(inception.from_torch(wide), image))
    scale = np.abs(double).max()
    errors = np.abs(found - single).max() / scale, np.abs(found_double - double).max() / scale
    print(f"{size} pixels, of the largest feature {scale:.3g}: fp32 {errors[0]:.1e}, fp64 {errors[1]:.1e}")
    assert errors[0] < 1e-5 and errors[1] < 1e-12  # fp32: 48 layers of sums in another order


def test_wrong_weights_are_named_in_one_line(tmp_path):
    for change, message in [
        ({"Mixed_6b.branch7x7_2.conv.weight": None}, "Mixed_6b.branch7x7_2.conv.weight"),
        ({"Mixed_7c.branch_pool.bn.running_var": np.zeros(3, np.float32)}, "Mixed_7c.branch_pool.bn.running_var"),
        ({"AuxLogits.conv0.conv.weight": np.zeros((128, 768, 1, 1), np.float32)}, "torchvision's network"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            inception.from_torch({k: v for k, v in (weights() | change).items() if v is not None}, "fid.pth")
        assert "fid.pth" in str(caught.value) and "\n" not in str(caught.value)
    torch_file.save(tmp_path / "fid.pth", {"weights": [1]})
    with pytest.raises(UserError, match=r"no Conv2d_1a_3x3.conv.weight"):
        inception.load(tmp_path / "fid.pth")


def test_features_of_8_bit_images_only():
    params = jax.eval_shape(lambda: inception.from_torch(weights()))
    found = jax.eval_shape(inception.features, params, jax.ShapeDtypeStruct((5, 64, 48, 3), np.uint8))
    assert found.shape == (5, 2048) and found.dtype == np.float32
    for shape, dtype in [((5, 64, 64, 3), np.float32), ((5, 64, 64, 1), np.uint8), ((64, 64, 3), np.uint8)]:
        with pytest.raises(ValueError, match="uint8"):
            jax.eval_shape(inception.features, params, jax.ShapeDtypeStruct(shape, dtype))
