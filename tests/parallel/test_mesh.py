"""Which meshes there are: as many devices as the machine has, no fewer."""

import jax
import pytest
from ml_collections import config_dict

from dpo_jax.parallel import mesh as mesh_lib


def make(data, fsdp, tensor, context=1):
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
  return mesh_lib.make(config_dict.ConfigDict(sizes))


@pytest.mark.parametrize(
  ("asked", "data"), [((None, 1, 1), 8), ((None, 2, 2), 2), ((2, 4, 1), 2)]
)
def test_the_data_axis_takes_the_devices_that_are_left(asked, data):
  mesh = make(*asked)
  assert mesh_lib.sizes(mesh)["data"] == data
  assert mesh.devices.size == jax.device_count() == 8
  assert mesh_lib.row_parallelism(mesh) == data * asked[1]


@pytest.mark.parametrize("asked", [(2, 2, 1), (4, 2, 2), (None, 3, 1)])
def test_fewer_or_more_devices_than_there_are_is_refused(asked):
  with pytest.raises(ValueError, match=r"but there are 8 devices; set mesh"):
    make(*asked)


def test_sequences_are_not_split_yet():
  with pytest.raises(ValueError, match=r"mesh\.context = 2"):
    make(None, 1, 1, context=2)
