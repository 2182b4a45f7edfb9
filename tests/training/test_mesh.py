"""What a mesh is made of, and which arrays are sharded over it; training on meshes is in test_devices.py."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec

from pspinal_jax.errors import UsageError
from pspinal_jax.recipes import MeshConfig, load_recipe
from pspinal_jax.runs.build import check_classes, run_mesh
from pspinal_jax.training.sharding import make_mesh, mesh_shape, partition_spec, shardings

AXES = {"data": 2, "fsdp": 4, "model": 2}


@pytest.mark.parametrize(
    ("axes", "devices", "shape"),
    [
        ((-1, 1, 1), 1, (1, 1, 1)),
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((-1, 2, 2), 8, (2, 2, 2)),
        ((2, 1, 4), 8, (2, 1, 4)),
        ((-1, 8, 1), 8, (1, 8, 1)),
    ],
)
def test_data_takes_what_the_other_axes_leave(axes, devices, shape):
    assert mesh_shape(*axes, devices) == shape


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ((-1, 1, 3), r"data -1 x fsdp 1 x model 3, expected divisors of 8, the number of devices"),
        ((-1, 16, 1), r"data -1 x fsdp 16 x model 1, expected divisors of 8"),
        ((4, 1, 1), r"data 4 x fsdp 1 x model 1, expected a product of 8, the number of devices"),
        ((4, 4, 1), r"expected a product of 8.*change --mesh.data"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(axes, expected):
    with pytest.raises(UsageError, match=expected):
        mesh_shape(*axes, 8)


def test_what_does_not_fit_is_refused_before_the_run():
    recipe = load_recipe("digits")
    with pytest.raises(UsageError, match=r"mesh.fsdp is 0, expected at least 1"):
        dataclasses.replace(recipe, mesh=MeshConfig(fsdp=0))
    with pytest.raises(UsageError, match=r"mesh.data is 0, expected at least 1, or -1"):
        dataclasses.replace(recipe, mesh=MeshConfig(data=0))
    with pytest.raises(UsageError, match=r"mesh.fsdp is 2, expected 1 with batch_norm=per_device"):
        dataclasses.replace(recipe, mesh=MeshConfig(fsdp=2), batch_norm="per_device")
    devices = jax.device_count()
    with pytest.raises(UsageError, match=r"batch_size is \d+, expected at least .* needs 2 examples on each device"):
        run_mesh(dataclasses.replace(recipe, batch_size=devices, batch_norm="per_device"))
    with pytest.raises(UsageError, match=r"the number of devices; change --mesh.data .* or --mesh.model"):
        run_mesh(dataclasses.replace(recipe, mesh=MeshConfig(fsdp=devices + 1)))
    with pytest.raises(UsageError, match=r"mesh.model is 4, expected a divisor of 10, the number of classes"):
        check_classes(dataclasses.replace(recipe, mesh=MeshConfig(model=4)), 10)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("head/output/kernel", (512, 100), ("fsdp", "model")),
        ("trace/head/output/kernel", (512, 100), ("fsdp", "model")),  # its momentum
        ("head/output/bias", (100,), ("model",)),
        ("head/output/kernel", (6, 100), (None, "model")),  # too small for fsdp
        ("head/layer_2/kernel", (640, 128), ("fsdp", None)),
        ("head/layer_2/kernel", (642, 128), (None, "fsdp")),  # 642 is not a multiple of 4
        ("head/layer_2/kernel", (641, 129), ()),
        ("head/layer_2/bias", (128,), ()),
        ("backbone/stage_1/conv_1/kernel", (3, 3, 64, 128), (None, None, None, "fsdp")),
        ("backbone/output/kernel", (512, 100), ("fsdp", None)),  # no head's
        ("count", (), ()),
    ],
)
def test_which_arrays_are_sharded(path, shape, spec):
    assert partition_spec(path, shape, AXES) == PartitionSpec(*spec)
    assert partition_spec(path, shape, {"data": 8, "fsdp": 1, "model": 1}) == PartitionSpec()


def test_the_axis_of_seeds_is_never_sharded(monkeypatch):
    specs = {(512, 128): PartitionSpec("data", None)}
    tree = {"head": {"output": {"kernel": jax.ShapeDtypeStruct((4096, 512, 128), "float32")}}}
    monkeypatch.setattr("pspinal_jax.training.sharding.partition_spec", lambda path, shape, axes: specs[shape])
    found = shardings(make_mesh(), tree, stacked=True)["head"]["output"]["kernel"].spec
    assert found == PartitionSpec(None, "data", None)
