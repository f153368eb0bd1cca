"""Which attention runs where, and what cannot."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from configs import base as base_config
from configs import common
from dpo_jax.data.batch import rows
from dpo_jax.models import decoder
from dpo_jax.ops import attention
from dpo_jax.ops.attention import choice, cudnn
from dpo_jax.run import build
from tests import worlds

FACTS = {"shared": True, "dtype": "bfloat16", "head_dim": 64, "softcap": None}


@pytest.mark.parametrize(
  ("where", "changes", "name"),
  [
    ("cpu", {}, "auto"),
    ("gpu", {}, "auto"),
    ("cuda", {}, "cudnn"),
    ("cuda", {"shared": False}, "cudnn"),
    ("cuda", {"dtype": "float32"}, "auto"),
    ("cuda", {"head_dim": 256}, "auto"),
    ("cuda", {"head_dim": 60}, "auto"),
    ("cuda", {"softcap": 50.0}, "auto"),
    ("tpu", {}, "auto"),
    ("tpu", {"shared": False}, "splash"),
    ("tpu", {"shared": False, "softcap": 50.0}, "splash"),
  ],
)
def test_auto_takes_the_kernel_of_the_platform_if_it_fits(where, changes, name):
  assert choice.resolve("auto", where, **{**FACTS, **changes})[0] == name


@pytest.mark.parametrize(
  ("name", "where", "changes", "says"),
  [
    ("splash", "cpu", {}, "is for tpu, and this is cpu"),
    ("cudnn", "tpu", {}, "is for cuda, and this is tpu"),
    ("splash", "tpu", {}, "set data.shared = False"),
    ("cudnn", "cuda", {"dtype": "float32"}, "set model.dtype = 'bfloat16'"),
    ("cudnn", "cuda", {"head_dim": 60}, "model.head_dim = 60"),
    ("cudnn", "cuda", {"softcap": 50.0}, "model.attention_softcap"),
  ],
)
def test_a_kernel_that_does_not_fit_is_refused(name, where, changes, says):
  with pytest.raises(ValueError, match=f"model.attention = '{name}'") as error:
    choice.resolve(name, where, **{**FACTS, **changes})
  assert says in str(error.value)


@pytest.mark.parametrize("name", ["tiled", "blockwise", "xla", "mine"])
@pytest.mark.parametrize("where", ["cpu", "cuda", "tpu"])
def test_what_is_no_kernel_runs_everywhere(name, where):
  assert choice.resolve(name, where, **FACTS) == (name, "as configured")


def test_cuda_is_told_from_other_gpus():
  def device(version):
    client = types.SimpleNamespace(platform_version=version)
    return types.SimpleNamespace(platform="gpu", client=client)

  assert choice.platform(device("PJRT C API\ncuda 12090")) == "cuda"
  assert choice.platform(device("PJRT C API\nrocm 60300")) == "gpu"
  assert choice.platform(jax.devices()[0]) == "cpu"


def test_on_a_cpu_long_examples_go_by_blocks():
  assert choice.plain("cpu", 1, 4, 128, 8)[0] == "tiled"
  assert choice.plain("cpu", 1, 4, 129, 8)[0] == "blockwise"


def test_scores_that_would_not_fit_go_by_blocks():
  assert choice.plain("tpu", 1, 4, 2048, 32)[0] == "tiled"
  assert choice.plain("tpu", 1, 1, 8192, 32)[0] == "blockwise"
  # 4 B · 32 heads · 8192² = 8 GiB on one device, 2 GiB on each of four.
  assert choice.plain("tpu", 1, 1, 8192, 8)[0] == "tiled"


@pytest.mark.parametrize(
  ("where", "limit", "name"),
  [
    ("cpu", 0, "tiled"),
    ("tpu", 2**40, "tiled"),
    ("tpu", 0, "blockwise"),
    ("cuda", 2**40, "cudnn"),
  ],
)
def test_auto_runs_what_it_chose(monkeypatch, where, limit, name):
  monkeypatch.setattr(choice, "platform", lambda device: where)
  monkeypatch.setattr(choice, "SCORES", limit)
  module = getattr(attention, name)
  monkeypatch.setattr(module, name, lambda *args, **kwargs: name)
  layout = attention.Layout(*[jnp.zeros((1, 4), int)] * 3, jnp.zeros((1, 1, 4)))
  x = jnp.zeros((1, 4, 2, 8), jnp.bfloat16)
  out = attention.ATTENTION["auto"](x, x, x, layout, window=None, scale=1.0)
  assert out == name


def test_cudnn_itself_refuses_what_it_does_not_have():
  batch = worlds.batch(worlds.examples(2))
  fields = (jnp.asarray(batch[name]) for name in attention.Layout._fields)
  x = jnp.zeros((*batch["tokens"].shape, 2, 8))
  with pytest.raises(ValueError, match="it has no float32"):
    cudnn.cudnn(x, x, x, attention.Layout(*fields), window=None, scale=1.0)


def test_the_log_says_what_attends_and_why():
  def shape(tile):
    return rows.Shape(8, 4 * tile, 9, 4, 2, tile, 4, 2)

  def line(name, where, tile, splits=(1, 1), **changes):
    facts = {**FACTS, **changes}
    return choice.describe(name, where, [shape(tile)], 32, splits, **facts)

  said = line("auto", "cpu", 512)
  assert said == (
    "attention blockwise (no kernel for cpu; examples of more than 128 tokens)"
  )
  assert line("tiled", "cpu", 64) == "attention tiled (as configured)"
  said = line("auto", "cuda", 64)
  assert said == "attention cudnn (the kernel for cuda)"
  said = line("auto", "cuda", 512, dtype="float32")
  assert said == (
    "attention tiled (not cudnn, it has no float32: set model.dtype = "
    "'bfloat16'; scores of 1,024 MiB)"
  )
  said = line("auto", "tpu", 2048)
  assert "blockwise" in said
  assert "are more than 4,096" in said
  assert "tiled" in line("auto", "tpu", 2048, splits=(4, 2))


def config(name="auto"):
  c = common.smoke(base_config.get_config())
  c.model.attention = name
  return c.lock()


def test_a_run_says_it_and_refuses_what_cannot_be():
  run = build.prepare(config())
  assert "; attention tiled (no kernel for cpu; examples of" in run.about[1]
  with pytest.raises(ValueError, match="is for tpu, and this is cpu"):
    build.prepare_model(config("splash"))


def test_a_kernel_is_tried_before_it_is_chosen(monkeypatch):
  assert cudnn.broken(16, "xla") is None
  found = cudnn.broken(24)  # there is no cuDNN on a CPU
  assert found is not None
  right = jax.nn.dot_product_attention
  monkeypatch.setattr(
    jax.nn, "dot_product_attention", lambda *a, **k: 1.1 * right(*a, **k)
  )
  # Past what the first line left in its cache.
  assert "differ" in cudnn.broken.__wrapped__(16, "xla")


def model(**changes):
  config = dataclasses.replace(
    worlds.MODELS["llama"], dtype="bfloat16", **changes
  )
  return decoder.build(config, worlds.VOCAB)


def test_a_kernel_that_does_not_work_is_not_chosen(monkeypatch):
  monkeypatch.setattr(choice, "platform", lambda device: "cuda")
  asked = model(attention="cudnn")
  cudnn.broken.cache_clear()
  with pytest.warns(UserWarning, match="not cudnn"):
    got = decoder.with_kernel(model(), None, True, 1)
  assert got.config.attention == "tiled"
  with pytest.raises(ValueError, match=r"model.attention = 'cudnn'"):
    decoder.with_kernel(asked, None, True, 1)
  monkeypatch.setattr(decoder.cudnn, "broken", lambda head_dim: None)
  assert decoder.with_kernel(asked, None, True, 1).config == asked.config
  with pytest.raises(ValueError, match="points of a sweep"):
    decoder.with_kernel(asked, None, True, 4)
