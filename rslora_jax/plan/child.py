"""Child: the process that loads the TPU compiler; `compiling` starts it and reads what it leaves.

It runs as a file of its own and imports nothing of this library: starting it costs an import of
JAX alone. The folder that it is given holds ``order.json`` and ``program.bin``; it leaves
``answer.json``.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

__all__ = ["main"]

MEMORY = {
    "arguments": "argument_size_in_bytes",
    "outputs": "output_size_in_bytes",
    "aliased": "alias_size_in_bytes",
    "temporaries": "temp_size_in_bytes",
    "code": "generated_code_size_in_bytes",
}
"""What the compiler tells about a program's memory, by the planner's names."""


def main(folder: Path) -> None:
    """Compiles the program of a folder and writes the answer there."""
    order = json.loads((folder / "order.json").read_text())
    try:
        answer = _compile(folder, order)
    except Exception as error:
        answer = {"error": type(error).__name__, "text": str(error)}
    whole = folder / "answer.part"
    whole.write_text(json.dumps(answer))
    whole.replace(folder / "answer.json")


def _compile(folder: Path, order: dict[str, Any]) -> dict[str, Any]:
    import jax  # noqa: PLC0415  # after the watch has started

    jax.config.update("jax_enable_x64", order["x64"])
    exported = jax.export.deserialize(bytearray((folder / "program.bin").read_bytes()))
    mesh = _mesh(order)
    args = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=_sharding(mesh, spec))
        for aval, spec in zip(exported.in_avals, order["specs"], strict=True)
    ]
    lowered = jax.jit(exported.call, donate_argnums=tuple(order["donated"])).lower(*args)
    start = time.monotonic()
    compiled = lowered.compile(compiler_options=order["options"] or None)
    seconds = time.monotonic() - start
    statistics = compiled.memory_analysis()
    memory = {name: getattr(statistics, theirs) for name, theirs in MEMORY.items()}
    return {"memory": memory, "seconds": seconds, **_text(compiled)}


def _text(compiled: Any) -> dict[str, str]:
    try:
        return {"hlo": compiled.as_text() or "", "unread": "the program has no text"}
    except Exception as error:
        # jaxlib can be older than libtpu: 0.10.2 cannot read some TPU7x programs of 0.0.52.
        return {"hlo": "", "unread": f"JAX cannot read the compiled program: {error}"}


def _mesh(order: dict[str, Any]) -> Any:
    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415
    from jax.experimental import topologies  # noqa: PLC0415

    settings = {"chip_config_name": order["config"]} if order["config"] else {}
    if order["num_slices"] > 1:
        settings["num_slices"] = order["num_slices"]
    name = order["topology"]
    found = topologies.get_topology_desc(platform="tpu", topology_name=name, **settings)
    if len(found.devices) != math.prod(order["mesh"].values()):
        raise ValueError(f"{name} has {len(found.devices)} devices for libtpu.")
    devices = _ordered(np.array(found.devices), tuple(order["mesh"].values()), order["num_slices"])
    types = tuple(jax.sharding.AxisType[kind] for kind in order["types"])
    return jax.sharding.Mesh(devices, tuple(order["mesh"]), axis_types=types)


def _ordered(devices: Any, shape: tuple[int, ...], num_slices: int) -> Any:
    """The devices in a mesh whose neighbours are neighbours in the torus, where JAX finds one."""
    from jax.experimental import mesh_utils  # noqa: PLC0415

    across = [1] * len(shape)
    if num_slices > 1:
        across[next(n for n, size in enumerate(shape) if size % num_slices == 0)] = num_slices
    within = [size // n for size, n in zip(shape, across, strict=True)]
    for split in (False, True):  # 32 x 8 on a torus of 16 x 16 must split an axis of it
        with contextlib.suppress(NotImplementedError, AssertionError, ValueError):
            if num_slices > 1:
                return mesh_utils.create_hybrid_device_mesh(
                    within, across, devices.tolist(), allow_split_physical_axes=split
                )
            return mesh_utils.create_device_mesh(
                shape, devices.tolist(), allow_split_physical_axes=split
            )
    return devices.reshape(shape)


def _sharding(mesh: Any, spec: list[list[str] | None]) -> Any:
    from jax.sharding import NamedSharding, PartitionSpec  # noqa: PLC0415

    return NamedSharding(mesh, PartitionSpec(*(tuple(entry) if entry else None for entry in spec)))


def _watch(parent: int, folder: Path) -> None:
    # A planner that is killed outright cannot end its child, which would compile on for minutes,
    # nor remove the folder that it made.
    while os.getppid() == parent:
        time.sleep(1.0)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    given, planner = Path(sys.argv[1]), os.getppid()
    threading.Thread(target=_watch, args=(planner, given), daemon=True).start()
    main(given)
    if os.getppid() != planner:
        shutil.rmtree(given, ignore_errors=True)
