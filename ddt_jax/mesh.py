"""The device mesh, and where each array lies on it.

Axes: replica (slow links between slices), data, fsdp (batch and parameters), tensor (heads, hidden widths), context
(positions of a row).
A model names the dimensions of its parameters by what they are; RULES says which mesh axis each name is spread over.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddt_jax import settings
from ddt_jax.errors import UserError

AXES = ("replica", "data", "fsdp", "tensor", "context")
BATCH = ("replica", "data", "fsdp")  # mesh axes that split the rows of a batch
CONTEXT = "context"  # that which splits the positions of a row

RULES: dict[str, str | None] = {
    "embed": "fsdp",  # the residual width
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",  # rows of embeddings and head
    "rank": None,  # of a low-rank update
    "head_dim": None,
    "codes": "tensor",  # rows of a codebook
    "code": None,  # features of one code
    "tokens": None,
    "patch": None,  # pixels or latents of one patch
    "frequency": None,
    "embed_out": "tensor",  # a width that is written where "embed" is read
    "layers": None,
}


def make_mesh(sizes: settings.Mesh, devices=None) -> Mesh:
    """A mesh with Auto axes over the given (default: all) devices. Slices of TPUs are parts of the replica axis.

    Raises:
      UserError: if the sizes do not multiply to the number of devices, or replica does not divide over their slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [getattr(sizes, axis) for axis in AXES]
    text = ", ".join(f"mesh.{a}={n}" for a, n in zip(AXES, shape, strict=True) if n != 1)
    if any(n == 0 or n < -1 for n in shape) or shape.count(-1) > 1:
        raise UserError(f"mesh: sizes are at least 1, and one of them may be -1 for the rest; got {text}")
    fixed = int(np.prod([n for n in shape if n > 0]))
    if -1 in shape and len(devices) % fixed == 0:
        shape[shape.index(-1)] = len(devices) // fixed
    if int(np.prod(shape)) != len(devices):
        raise UserError(f"mesh: {text} does not fit {len(devices)} devices; the product must equal their number")
    return Mesh(_placed(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _placed(shape: list[int], devices) -> np.ndarray:
    """Devices [replica, data, ...] so that neighbours on an axis are neighbours in the machine, if that is possible."""
    tpu = devices[0].platform == "tpu"  # hosts of GPUs count as slices too, but any axis may cross them
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if tpu else 1
    if shape[0] % slices:
        raise UserError(
            f"mesh: mesh.replica={shape[0]} does not divide over {slices} slices; set mesh.replica={slices}"
        )

    def place(**how):
        if slices == 1:
            return mesh_utils.create_device_mesh(shape, devices, **how)
        inside, between = (shape[0] // slices, *shape[1:]), (slices, *(1 for _ in shape[1:]))
        return mesh_utils.create_hybrid_device_mesh(inside, between, devices, **how)

    try:
        return place(allow_split_physical_axes=devices[0].device_kind == "TPU v5 lite")
    except NotImplementedError:  # no product of whole sides of the torus has these sizes
        return place(allow_split_physical_axes=True)


@dataclass(frozen=True)
class Fallback:
    """A dimension that stays whole because its mesh axis does not divide it."""

    path: str
    dimension: int
    size: int
    axis: str
    axis_size: int

    def __str__(self):
        return f"{self.path}: dimension {self.dimension} of {self.size} is not split over {self.axis}={self.axis_size}"


def partition(axes, shape, mesh: Mesh, path: str = "") -> tuple[PartitionSpec, list[Fallback]]:
    """The partition of one parameter, by RULES.

    A dimension that its mesh axis does not divide is kept whole on every device and reported.

    Raises:
      ValueError: for a logical name without a rule, or two dimensions on one mesh axis.
    """
    spec, fallbacks = [], []
    for i, (name, size) in enumerate(zip(axes, shape, strict=True)):
        if name is not None and name not in RULES:
            raise ValueError(f"{path}: no rule in mesh.RULES for the axis {name!r}")
        axis = RULES[name] if name is not None else None
        if axis in spec and axis is not None:
            raise ValueError(f"{path}: axes {axes} put two dimensions on the mesh axis {axis!r}")
        if axis is not None and size % mesh.shape[axis]:
            fallbacks.append(Fallback(path, i, size, axis, mesh.shape[axis]))
            axis = None
        spec.append(axis)
    return PartitionSpec(*spec), fallbacks


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over every batch axis, other dimensions whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def row_parts(mesh) -> int:
    """Parts into which a mesh splits rows."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_axes(rows: int, mesh) -> tuple[str, ...]:
    """The axes over which so many rows are split: all batch axes, or none where they do not divide them."""
    return BATCH if rows % row_parts(mesh) == 0 else ()


def batch_parts(rows: int) -> int:
    """Parts into which so many rows are split by the mesh that is set; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or not batch_axes(rows, mesh) else row_parts(mesh)


def constrain_batch(x):
    """x inside a traced function, with its rows over the batch axes of the mesh that is set; without one, x itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch_axes(x.shape[0], mesh)))


def position_parts(*lengths: int) -> int:
    """Parts into which the mesh that is set splits rows of so many positions; 1 where it does not divide all of them,
    or there is none.
    """
    parts = jax.sharding.get_abstract_mesh().shape.get(CONTEXT, 1)
    return 1 if any(length % parts for length in lengths) else parts


def position_axis(*lengths: int) -> str | None:
    """The axis over which rows of so many positions lie; None: a device has all positions of its rows."""
    return CONTEXT if position_parts(*lengths) > 1 else None


def constrain_positions(x):
    """`constrain_batch` of x [B, S, ...], its positions over the context axis."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch_axes(x.shape[0], mesh), position_axis(x.shape[1])))


def look_up(table_VD, ids, axes, dtype):
    """Rows [B, S, D] of a table in some type; B over the batch axes but one, S over context, D split as the table's.

    So a device looks up its own columns of a table, and adds up those of its gradient. Left to itself, the compiler
    puts the table together on each device, and its gradient too: rows are over the axis that has the columns.

    Args:
      ids: int32 [B, S] in [0, V).
      axes: of the table, as `partition` takes them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not batch_axes(ids.shape[0], mesh):
        return table_VD[ids].astype(dtype)
    columns = partition(axes, table_VD.shape, mesh)[0][-1]
    rows, context = tuple(axis for axis in BATCH if axis != columns), position_axis(ids.shape[1])
    ids = jax.lax.with_sharding_constraint(ids, PartitionSpec(rows))
    if context:  # in two steps, which the compiler takes without a detour
        ids = jax.lax.with_sharding_constraint(ids, PartitionSpec(rows, context))
    found = table_VD[ids].astype(dtype)
    return jax.lax.with_sharding_constraint(found, PartitionSpec(rows, context, columns))


@dataclass(frozen=True)
class Reader:
    """What a host reads of every global batch: of `count` equal parts of its rows the part `index`.

    Hosts that hold the same rows, where tensor or context goes over several, read the same part.

    Attributes:
      processes: one host of each part, in order: what hosts find out about their rows is put together from these.
    """

    index: int
    count: int
    processes: tuple[int, ...]

    @property
    def leads(self) -> bool:
        """Whether this host speaks for its part."""
        return jax.process_index() == self.processes[self.index]


def reader(mesh: Mesh | settings.Mesh | None = None) -> Reader:
    """Of this host. mesh: or its sizes; None: that which is set, and without one every host has rows of its own.

    Raises:
      UserError: as `readers`.
    """
    here, hosts = jax.process_index(), jax.process_count()
    if mesh is None and hosts > 1:
        mesh = jax.sharding.get_mesh()
    if hosts == 1 or (isinstance(mesh, Mesh) and mesh.empty):
        return Reader(here, hosts, tuple(range(hosts)))
    groups = readers(make_mesh(mesh) if isinstance(mesh, settings.Mesh) else mesh)
    index = next(i for i, group in enumerate(groups) if here in group)
    return Reader(index, len(groups), tuple(min(group) for group in groups))


def readers(mesh: Mesh) -> list[list[int]]:
    """Hosts that hold the same rows, in the order of these.

    Raises:
      UserError: if hosts share some of their rows and not all of them.
    """
    hosts = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(row_parts(mesh), -1)
    held, groups = defaultdict(set), defaultdict(list)
    for part, sharing in enumerate(hosts):
        for host in sharing:
            held[int(host)].add(part)
    for host, parts in sorted(held.items()):
        groups[tuple(sorted(parts))].append(host)
    if sum(map(len, groups)) != len(hosts) or len(set(map(len, groups))) > 1:
        raise UserError(
            f"mesh: with mesh.tensor={mesh.shape['tensor']} x mesh.context={mesh.shape[CONTEXT]} hosts share some of "
            f"their rows and not all of them; let the product divide {mesh.size // len(held)}, a host's devices, or be "
            "divided by it"
        )
    return [groups[parts] for parts in sorted(groups)]


def check_batch(batch_size: int, mesh: Mesh, name: str) -> None:
    """Raises UserError unless the rows divide over the batch axes, and hosts can read them: see `readers`."""
    readers(mesh)
    parts = row_parts(mesh)
    if batch_size % parts:
        raise UserError(f"mesh: {name}={batch_size} does not divide over {parts} devices (replica x data x fsdp)")


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """Host-local rows of a batch (NumPy) as global arrays; hosts that share rows give the same."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def flag_shape(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Of `put_flag`: int32 [devices], one number on each."""
    return jax.ShapeDtypeStruct((mesh.size,), np.int32, sharding=NamedSharding(mesh, PartitionSpec(AXES)))


def put_flag(value: bool, mesh: Mesh) -> jax.Array:
    """What this host says, on each of its devices. No column of the batch: hosts that share rows may say different."""
    shape = flag_shape(mesh)
    return jax.make_array_from_callback(shape.shape, shape.sharding, lambda _: np.full(1, value, shape.dtype))


def put_whole(value, abstract):
    """An array that every host holds whole, in the type and with the sharding of its ShapeDtypeStruct."""
    value = value.astype(abstract.dtype)
    return jax.make_array_from_callback(abstract.shape, abstract.sharding, lambda index: value[index])
