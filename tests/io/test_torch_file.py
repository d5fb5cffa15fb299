"""Files of torch.save: read without running them, written so that PyTorch reads them. Oracle: PyTorch itself."""

import argparse
import collections
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ddt_jax.errors import UserError
from ddt_jax.io import torch_file

DTYPES = [
    "float64",
    "float32",
    "float16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
    "complex128",
]
DTYPES += ["complex64", "complex128"]
NEW_DTYPES = ["uint16", "uint32", "uint64"]
ML_DTYPES = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]


def numbers(dtype, shape=(3, 4)):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return np.random.default_rng(0).normal(0, 9, shape).astype(np.float32).clip(0, 20).astype(dtype)


def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_array_equal(np.asarray(a).tobytes(), np.asarray(b).tobytes())


def archive(program: bytes, **entries) -> bytes:
    """A zip as torch.save lays it out, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in {"data.pkl": program, "byteorder": b"little", "version": b"3\n", **entries}.items():
            file.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def refusal(path, data=None) -> str:
    """The one line with which a file is refused."""
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        torch_file.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


class Call:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def test_what_is_saved_comes_back(tmp_path):
    tree = {d: numbers(d) for d in DTYPES + NEW_DTYPES + ML_DTYPES}
    tree |= {
        "scalar": np.float32(2.5),
        "zero_dim": np.array(7),
        "empty": np.zeros((0, 3)),
        "columns": numbers("int8").T,
    }
    tree["more"] = {"list": [1, -1, 2**40, -(2**70), True, None, 0.1], "tuple": ("é", ()), 5: {}}
    found = torch_file.load(torch_file.save(tmp_path / "a" / "x.pt", tree))
    assert found["more"] == tree["more"] and found["scalar"] == 2.5 and type(found["scalar"]) is float
    for name in set(tree) - {"more", "scalar"}:
        same(found[name], tree[name])


def test_loaded_arrays_are_views_of_the_mapped_file_and_share_what_was_shared(tmp_path):
    weight = numbers("float32", (1000, 1000))
    path = torch_file.save(tmp_path / "x.pt", {"embed": weight, "head": weight, "other": weight.copy()})
    assert 8e6 < path.stat().length < 8.01e6  # shared: written once
    found = torch_file.load(path)
    assert np.shares_memory(found["embed"], found["head"]) and not np.shares_memory(found["embed"], found["other"])
    assert not found["embed"].flags.owndata and not found["embed"].flags.writeable
    assert all(found[name].ctypes.data % 64 == 0 for name in found)


def test_large_entries_are_aligned_and_readable_too(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "_ZIP64_FROM", 0)
    tree = {"a": numbers("float32"), "b": numbers("bool", (7,)), "c": numbers("int64")}
    found = torch_file.load(torch_file.save(tmp_path / "x.pt", tree))
    for name in tree:
        same(found[name], tree[name])
        assert found[name].ctypes.data % 64 == 0


def test_same_weights_give_the_same_file(tmp_path):
    a, b = (torch_file.save(tmp_path / name, {"x": numbers("float32")}) for name in "ab")
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Call(os.system, "echo run > {}"), f"{os.name}.system"),
        (Call(eval, "1"), ".eval, which"),
        (Call(getattr, "a", "b"), "getattr"),
        (np.float64(1), "numpy"),
        (np.zeros(2), "numpy"),
        (collections.Counter("a"), "collections.Counter"),
        ({1, 2}, "set"),
        ({(1, 2): 3}, "a key of type tuple"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_anything_but_plain_data_is_refused_by_name_and_not_run(tmp_path, value, named):
    if isinstance(value, Call) and value.reduced[0] is os.system:
        value.reduced = os.system, (value.reduced[1][0].format(tmp_path / "was_run"),)
    for protocol in (2, 4):
        line = refusal(tmp_path / "x.pt", archive(pickle.dumps({"weight": value}, protocol)))
        assert named in line and "refused" in line
        refusal(tmp_path / "old.pt", pickle.dumps({"weight": value}, protocol))
    assert not (tmp_path / "was_run").exists()


class Settings(dict):
    """As trainers have them: entries that are attributes too, of a class that is not there when the file is read."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.__dict__ = self


class Numbers(list):
    pass


@pytest.mark.parametrize("protocol", [2, 4])
def test_beside_the_entry_that_is_wanted_anything_may_lie_and_nothing_of_it_is_run(tmp_path, protocol):
    beside = [Settings(a=1, b=Settings(c=[2])), Numbers([1, 2]), {1, 2}, collections.Counter("ab"), np.zeros(2)]
    beside += [argparse.Namespace(a=1), Path("/x"), Call(os.system, f"echo run > {tmp_path / 'was_run'}"), Settings]
    path = tmp_path / "x.pt"
    path.write_bytes(archive(pickle.dumps({"iter": 3, "state_dict": {"a": [1.5]}, "cfg": beside}, protocol)))
    assert torch_file.load(path, within="state_dict") == {"a": [1.5]}
    assert not (tmp_path / "was_run").exists()
    assert "Settings, which was refused" in refusal(path)
    path.write_bytes(archive(pickle.dumps({"state_dict": {"a": beside[:1]}}, protocol)))
    with pytest.raises(UserError, match="Settings, which was refused"):
        torch_file.load(path, within="state_dict")
    path.write_bytes(archive(pickle.dumps({"a": [1.5]}, protocol)))
    assert torch_file.load(path, within="state_dict") == {"a": [1.5]}


def test_a_file_cannot_alter_what_names_mean():
    """BUILD on one of our names would change it for the next file."""
    name = pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n"
    state = pickle.EMPTY_DICT + pickle.MARK + b"U\4call" + pickle.NONE + pickle.SETITEMS
    for program, said in ((name + state + pickle.BUILD, "a changed torch"), (name, "^torch")):
        with pytest.raises(torch_file._Refused, match=f"{said}._utils._rebuild_tensor_v2"):
            torch_file._plain(torch_file._Unpickler(io.BytesIO(program + pickle.STOP)).load(), None)


def test_a_tensor_cannot_reach_outside_of_its_storage(tmp_path):
    good = torch_file.save(tmp_path / "x.pt", {"x": np.arange(6, dtype=np.float32)}).read_bytes()
    with zipfile.ZipFile(io.BytesIO(good)) as file:
        program, data = file.read("archive/data.pkl"), file.read("archive/data/0")
    six = pickle.BININT + struct.pack("<i", 6)
    assert program.count(six) == 2  # elements of the storage, shape
    at = program.rindex(six)
    for shape in (7, 2**31 - 1, -1):
        wrong = program[:at] + pickle.BININT + struct.pack("<i", shape) + program[at + 5 :]
        assert "a tensor of shape" in refusal(tmp_path / "y.pt", archive(wrong, **{"data/0": data}))
    assert "truncated" in refusal(tmp_path / "y.pt", archive(program, **{"data/0": data[:-1]}))
    assert "truncated" in refusal(tmp_path / "y.pt", archive(program))


def test_a_few_bytes_cannot_ask_for_gigabytes(tmp_path):
    bomb = pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.LONG_BINPUT + struct.pack("<I", 2**31) + pickle.STOP
    assert "place 2147483648 of a memo that has 1" in refusal(tmp_path / "x.pt", archive(bomb))
    assert "place 2147483648 of a memo that has 1" in refusal(tmp_path / "y.pt", bomb)


def test_truncated_and_foreign_files_are_refused_in_one_line(tmp_path):
    good = torch_file.save(tmp_path / "x.pt", {"x": numbers("float32", (20,))}).read_bytes()
    for length in range(1, len(good), 7):
        assert "truncated" in refusal(tmp_path / "y.pt", good[:length])
    assert "truncated" in refusal(tmp_path / "y.pt", b"<html>not found\n</html>")
    assert "empty" in refusal(tmp_path / "y.pt", b"")
    assert "cannot be read" in refusal(tmp_path / "missing.pt")
    assert "cannot be read" in refusal(tmp_path)


def test_cycles_and_sharing_do_not_blow_up(tmp_path):
    shared = ["x"]
    for _ in range(60):
        shared = [shared, shared]  # 2^60 leaves if it were copied
    cycle: list = [shared]
    cycle.append(cycle)
    (tmp_path / "x.pt").write_bytes(archive(pickle.dumps({"x": cycle}, 2)))
    found = torch_file.load(tmp_path / "x.pt")["x"]
    assert found[1] is found and found[0][0] is found[0][1]


def test_only_plain_data_is_saved(tmp_path):
    with pytest.raises(ValueError, match="no tensors of <U1"):
        torch_file.save(tmp_path / "x.pt", {"x": np.array(["a"])})
    with pytest.raises(ValueError, match="set cannot be saved"):
        torch_file.save(tmp_path / "x.pt", {"x": {1}})
    with pytest.raises(ValueError, match="only a dict"):
        torch_file.save(tmp_path / "x.pt", np.zeros(2))
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_reads_what_pytorch_writes(tmp_path, oracle, layout):
    torch = oracle("torch")
    tensors = {d: torch.tensor(numbers(d)) for d in DTYPES + NEW_DTYPES}
    tensors |= {d: torch.arange(12).reshape(3, 4).to(getattr(torch, d)) for d in ML_DTYPES}
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    odd = {"base": base, "slice": base[1:3, ::2], "transposed": base.T, "expanded": base[0, 0].expand(3), "int": 3}
    odd |= {"empty": torch.zeros(0, 2), "scalar": torch.tensor(1.5), "parameter": torch.nn.Parameter(base.clone())}
    tree = collections.OrderedDict(tensors=tensors, odd=odd, size=base.shape, list=[1, (2.0, "ü", None)])
    torch.save(tree, tmp_path / "x.pt", _use_new_zipfile_serialization=layout == "zip")
    found = torch_file.load(tmp_path / "x.pt")
    for name, tensor in tensors.items():
        expected = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert found["tensors"][name].tobytes() == expected and found["tensors"][name].dtype.name == name
    for name, tensor in odd.items():
        if name != "int":
            np.testing.assert_array_equal(found["odd"][name], tensor.detach().numpy())
    assert np.shares_memory(found["odd"]["base"], found["odd"]["slice"])
    assert found["odd"]["transposed"].strides == (4, 24) and found["odd"]["expanded"].strides == (0,)
    assert found["size"] == (4, 6) and found["list"] == [1, (2.0, "ü", None)] and found["odd"]["int"] == 3


@pytest.mark.slow
def test_reads_the_state_dict_of_a_module(tmp_path, oracle):
    torch = oracle("torch")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(torch.bfloat16)
    torch.save(module.state_dict(), tmp_path / "x.pt")
    found = torch_file.load(tmp_path / "x.pt")
    assert type(found) is dict and list(found) == list(module.state_dict())
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(found[name].astype(np.float32), tensor.float().numpy())
    torch.save(module, tmp_path / "x.pt")  # the module itself
    assert "torch.nn.modules.container.Sequential, which was refused" in refusal(tmp_path / "x.pt")


@pytest.mark.slow
@pytest.mark.parametrize("zip64_from", [0, 1 << 30])
def test_pytorch_reads_what_is_saved(tmp_path, oracle, monkeypatch, zip64_from):
    torch = oracle("torch")
    monkeypatch.setattr(torch_file, "_ZIP64_FROM", zip64_from)
    tree = {d: numbers(d) for d in DTYPES + NEW_DTYPES + ML_DTYPES}
    tree |= {"zero_dim": np.array(7), "empty": np.zeros((0, 3)), "columns": numbers("int8").T, "tied": tree["float32"]}
    tree["more"] = {"list": [1, -1, 2**40, True, None, 0.1], "tuple": ("é", ()), 5: {}}
    path = torch_file.save(tmp_path / "x.pt", tree)
    for how in ({}, {"mmap": True}):
        found = torch.load(path, weights_only=True, **how)
        assert found["more"] == tree["more"]
        assert found["tied"].data_ptr() == found["float32"].data_ptr()
        for name in set(tree) - {"more"}:
            assert found[name].dtype == getattr(torch, tree[name].dtype.name) and found[name].shape == tree[name].shape
            # Contiguous first, or the bytes of an array in column order are taken in another order.
            assert found[name].contiguous().flatten().view(torch.uint8).numpy().tobytes() == tree[name].tobytes()
