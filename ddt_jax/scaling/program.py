"""What one device does in a run of a compiled program, counted in its text: products, memory traffic, collectives.

A compiler's own count takes the body of a loop once. Here it counts as often as it turns, whatever is nested in it,
and collectives are found inside fusions and asynchronous calls too.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from ddt_jax.scaling import hlo, trips

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# Nothing of these moves through memory by itself.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "iota", "add-dependency"}
_SLICES = ("dynamic-slice", "slice", "gather")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:\[([\d,]+)\]T\(([\d,]+)\)|([\d,]+))\))? \{([^}]*)\}"
)
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}  # products of a tile: q k, p v; with gradients p again, dp, ds k, ...


@dataclass(frozen=True)
class Collective:
    """Devices that talk to each other.

    Attributes:
      kind: one of COLLECTIVES.
      bytes: of the whole that a group shares, on each of its devices: what was gathered, reduced or is scattered.
      group: numbers of the devices of one group, in the order of the mesh.
      shapes: of the arrays that are that whole.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...] = ()

    def axes(self, mesh) -> tuple[str, ...]:
        """The axes of the mesh along which a group lies."""
        places = np.unravel_index(np.array(self.group), mesh.devices.shape)
        return tuple(n for n, at in zip(mesh.axis_names, places, strict=True) if len(set(at.tolist())) > 1)


@dataclass
class Work:
    """Of one device.

    Attributes:
      flops: of matrix products and convolutions; a multiplication and an addition are two.
      hbm_bytes: read and written by instructions, as far as operands are not on the chip.
      collectives: how often each runs.
      unknown_loops: names of loops whose trips the text does not say; they count once.
      unknown_kernels: names of custom calls whose operations are not known; they count nothing.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: Counter = field(default_factory=Counter)
    unknown_loops: set = field(default_factory=set)
    unknown_kernels: set = field(default_factory=set)

    def add(self, other: "Work", times: int = 1) -> None:
        self.flops += times * other.flops
        self.hbm_bytes += times * other.hbm_bytes
        for what, count in other.collectives.items():
            self.collectives[what] += times * count
        self.unknown_loops |= other.unknown_loops
        self.unknown_kernels |= other.unknown_kernels


@dataclass
class Loop:
    """A loop that a program runs once.

    Attributes:
      turns: of its body, at most; None: the text does not say.
      turn: the work of one.
      carried: arrays that it hands from turn to turn.
    """

    turns: int | None
    turn: Work
    carried: tuple[hlo.Array, ...]


def read(text: str, num_devices: int, attention_share: float = 1.0) -> Work:
    """The work of a program.

    Args:
      text: `compiled.as_text()`.
      num_devices: that it runs on.
      attention_share: of all pairs of a query and a key, those whose tiles a TPU's attention kernel looks at.
    """
    module = hlo.parse(text)
    return _Reader(module, num_devices, attention_share).of(module.entry)


def loops(text: str, num_devices: int) -> list[Loop]:
    """The loops that stand in no other one, whatever is called in between. As `read`."""
    module = hlo.parse(text)
    reader, found, pending = _Reader(module, num_devices, 1.0), [], [module.entry]
    while pending:
        computation = module.computations[pending.pop()]
        for i in computation.instructions.values():
            if i.opcode == "while":
                turn = reader.of(i.attribute("body").lstrip("%"))
                found.append(Loop(trips.of(module, computation, i), turn, i.arrays))
            elif i.opcode == "call":
                pending += i.computations()
    return found


class _Reader:
    def __init__(self, module, num_devices, attention_share):
        self._module, self._num_devices, self._attention_share = module, num_devices, attention_share
        self._seen = {}

    def of(self, name: str, fused: bool = False) -> Work:
        """fused: inside a fusion, where nothing goes through memory."""
        if (name, fused) not in self._seen:
            work, computation = Work(), self._module.computations[name]
            for instruction in computation.instructions.values():
                self._count(work, computation, instruction, fused)
            self._seen[name, fused] = work
        return self._seen[name, fused]

    def _count(self, work, computation, i, fused):
        if i.opcode.endswith(("-done", "-update")):
            return
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            work.collectives[self._collective(kind, computation, i)] += 1
        elif i.opcode == "while":
            turns = trips.of(self._module, computation, i)
            if turns is None:
                work.unknown_loops.add(i.name)
            work.add(self.of(i.attribute("body").lstrip("%")), 1 if turns is None else turns)
        elif i.opcode == "conditional":
            work.add(max((self.of(name) for name in i.computations()), key=lambda w: (w.flops, w.hbm_bytes)))
        elif i.opcode == "dot":
            work.flops += _dot(computation, i)
        elif i.opcode == "convolution":
            work.flops += _convolution(computation, i)
        elif i.opcode == "custom-call":
            self._custom_call(work, computation, i)
        elif i.opcode in ("fusion", "call", "async-start"):
            for name in i.computations():
                work.add(self.of(name, fused or i.opcode == "fusion"))
        if not fused and i.opcode not in _FREE:
            work.hbm_bytes += self._traffic(computation, i)

    def _collective(self, kind, computation, i):
        groups = _groups(i, self._num_devices)
        operands = [a for name in i.operands for a in computation.arrays(name)]
        given, shapes = sum(a.bytes for a in operands), tuple(a.dims for a in operands)
        if kind == "all-gather":
            given *= len(groups)
            along = int(re.search(r"\d+", i.attribute("dimensions")).group())
            shapes = tuple((*s[:along], s[along] * len(groups), *s[along + 1 :]) for s in shapes)
        if kind == "all-reduce" and _is_scattered(computation, i):
            kind = "reduce-scatter"
        return Collective(kind, given, groups, shapes)

    def _custom_call(self, work, computation, i):
        if "tpu_custom_call" not in i.rest:
            return
        found = re.search(r"splash_mha_(fwd|dq|dkv)", i.name + i.rest)
        if not found:
            work.unknown_kernels.add(i.name)
            return
        q, k, *_ = (
            a for name in i.operands for a in computation.arrays(name) if len(a.dims) >= 3 and a.dtype[0] in "bf"
        )
        work.flops += 2 * _SPLASH[found.group(1)] * q.size * k.dims[-2] * self._attention_share

    def _traffic(self, computation, i) -> float:
        """Bytes of HBM that an instruction reads and writes. A slice of an array is read, not all of it."""
        operands = [computation.arrays(name) for name in i.operands]
        if i.opcode == "fusion":
            return self._fusion_traffic(computation, i, operands)
        if i.opcode in _SLICES:
            return 2 * _bytes(i.arrays)
        if i.opcode == "dynamic-update-slice":
            return 2 * _bytes(operands[1])
        if i.opcode.endswith("-start"):
            return _bytes(a for arrays in operands for a in arrays) + max((a.hbm_bytes for a in i.arrays), default=0)
        return _bytes(i.arrays) + sum(map(_bytes, operands))

    def _fusion_traffic(self, computation, i, operands):
        inner = self._module.computations[i.computations()[0]]
        total = 0
        for parameter in inner.instructions.values():
            if parameter.opcode != "parameter":
                continue
            arrays = operands[int(parameter.inside)]
            users = list(inner.users(parameter.name))
            if users and all(u.opcode in _SLICES for u in users):
                total += 0 if all(a.on_chip for a in arrays) else sum(a.bytes for u in users for a in u.arrays)
            elif not (
                users and all(u.opcode == "dynamic-update-slice" and u.operands[0] == parameter.name for u in users)
            ):
                total += _bytes(arrays)
        if inner.root.opcode == "dynamic-update-slice":
            return total + _bytes(inner.arrays(inner.root.operands[1]))
        return total + _bytes(i.arrays)


def _is_updated(user, name) -> bool:
    """Whether an array is only written into, in place."""
    return user.opcode == "dynamic-update-slice" and user.operands[0] == name


def _bytes(arrays) -> int:
    return sum(a.hbm_bytes for a in arrays)


def _is_scattered(computation, i) -> bool:
    """Whether each device keeps only its part of a sum: what a TPU makes of a reduce-scatter."""
    pending, ways = [i.name], 0
    while pending:
        for user in computation.users(pending.pop()):
            if user.opcode in ("bitcast", "reshape", "copy", "get-tuple-element", "convert"):
                pending.append(user.name)
            elif user.opcode == "dynamic-slice":
                ways += 1
            else:
                return False
    return ways > 0


def _groups(i: hlo.Instruction, num_devices: int) -> tuple[int, ...]:
    """Devices of the first group; of a permutation those that are moved along, the first and where it leads."""
    if pairs := i.attribute("source_target_pairs"):
        ends = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)\}", pairs)]
        moved = [pair for pair in ends if pair[0] != pair[1]]
        return _chain(moved) if moved else (0,)
    if by_mesh := _MESH_GROUPS.search(i.rest):
        return _mesh_group(*by_mesh.groups())
    text = i.attribute("replica_groups")
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims, order = (tuple(map(int, x.split(","))) if x else None for x in iota.groups())
        numbers = np.arange(math.prod(dims)).reshape(dims)
        numbers = numbers if order is None else numbers.transpose(order)
        return tuple(numbers.reshape(shape)[0].tolist())
    first = re.search(r"\{(\d[\d,]*)\}", text)
    return tuple(map(int, first.group(1).split(","))) if first else tuple(range(num_devices))


def _mesh_group(sizes: str, dims: str, order: str, numbers: str, named: str) -> tuple[int, ...]:
    """The first group along axes of a mesh that the text spells out: `'b':(2)4` is the part of axis b that has 4 places
    behind 2 of its own.
    """
    mesh = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    ids = np.arange(math.prod(mesh.values()))
    if dims:
        ids = ids.reshape(tuple(map(int, dims.split(",")))).transpose(tuple(map(int, order.split(","))))
    elif numbers:
        ids = np.array(tuple(map(int, numbers.split(","))))
    parts = {name: (1, size) for name, size in mesh.items()}
    chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named)
    for name, before, size in chosen:
        parts[name] = (int(before), int(size)) if size else parts[name]
    shape = [n for name, size in mesh.items() for n in (parts[name][0], parts[name][1], size // math.prod(parts[name]))]
    wanted = {name for name, *_ in chosen}
    at = tuple(slice(None) if k == 1 and name in wanted else 0 for name in mesh for k in range(3))
    return tuple(ids.reshape(shape)[at].reshape(-1).tolist())


def _chain(pairs) -> tuple[int, ...]:
    """The devices that a permutation's first pair leads through."""
    to = dict(pairs)
    at = pairs[0][0]
    way = [at]
    while to.get(at, way[0]) not in way:
        at = to[at]
        way.append(at)
    return tuple(way)


def _dot(computation, i) -> float:
    left = computation.arrays(i.operands[0])[0]
    contracted = re.findall(r"\d+", i.attribute("lhs_contracting_dims"))
    return 2.0 * i.arrays[0].size * math.prod(left.dims[int(d)] for d in contracted)


def _convolution(computation, i) -> float:
    """Pairs of an output and a kernel element that meet an element of the input, by window dimension; a TPU's products
    of matrices are convolutions, with padding and holes of which nothing is computed.
    """
    image, kernel = (computation.arrays(name)[0] for name in i.operands[:2])
    labels = re.match(r"(\w+)_(\w+)->(\w+)", i.attribute("dim_labels"))
    at_image, at_kernel, at_out = labels.groups()
    window = _window(i.attribute("window"), len(at_image) - 2)
    pairs = 1
    for d, w in enumerate(window):
        pairs *= _meetings(image.dims[at_image.index(str(d))], i.arrays[0].dims[at_out.index(str(d))], **w)
    features = kernel.dims[at_kernel.index("i")]  # of a group
    batch = image.dims[at_image.index("b")] / int(i.attribute("batch_group_count") or 1)
    return 2.0 * features * i.arrays[0].dims[at_out.index("f")] * batch * pairs


def _window(text: str, rank: int) -> list[dict]:
    parts = dict(re.findall(r"(\w+)=([\w\-]+)", text))

    def values(name, default):
        return parts[name].split("x") if name in parts else [default] * rank

    def numbers(name, default):
        return [int(x) for x in values(name, default)]

    rows = zip(
        numbers("size", 1),
        numbers("stride", 1),
        [int(x.split("_")[0]) for x in values("pad", "0_0")],
        numbers("lhs_dilate", 1),
        numbers("rhs_dilate", 1),
        strict=True,
    )
    return [dict(zip(("size", "stride", "low", "holes", "spread"), row, strict=True)) for row in rows]


def _meetings(inputs, outputs, size, stride, low, holes, spread) -> int:
    """Pairs of an output and a kernel element whose place holds an input element."""
    if size == 1 and low == 0 and holes == 1 and (outputs - 1) * stride < inputs:
        return outputs
    places = np.arange(outputs)[:, None] * stride + np.arange(size)[None] * spread - low
    return int(((places >= 0) & (places % holes == 0) & (places // holes < inputs)).sum())
