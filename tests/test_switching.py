"""Losses are switched by the config's argument alone, references too."""

import jax
import pytest

from configs import losses as fields
from dpo_jax import algos, cli
from dpo_jax.config import load as load_lib
from dpo_jax.ops import losses
from dpo_jax.ops.losses import catalogue
from dpo_jax.run import build
from tests import conftest

NAMES = [n for n, loss in losses.LOSSES.items() if not loss.of_rewards]


def load(arg, *overrides):
  return load_lib.load_config(
    f"{conftest.ROOT}/configs/dpo.py:smoke,{arg}",
    ("data.train=toy:24", "data.eval=None", *overrides),
  )


def terms_of(config):
  """Shapes of the Terms of the first batch of a config's data."""
  run = build.prepare(config)
  batch, _ = run.feed.loader.batch(0)
  params = jax.eval_shape(run.setup.model.init, jax.random.key(0))

  def terms(params, batch):
    extra = run.algorithm.extra(params)
    batch = run.algorithm.prepare(batch, {"ref": params}, extra)
    return run.algorithm.objective(params, {}, batch, run.hparams, extra)

  return jax.eval_shape(terms, params, batch)


@pytest.mark.parametrize("name", [*NAMES, *losses.MIXTURES])
def test_a_name_is_all_that_it_takes(name):
  config = load(f"loss={name}")
  terms = terms_of(config)
  assert set(terms.losses) == {part for _, part in fields.parse(name)}
  values, weights = next(iter(terms.losses.values()))
  assert values.shape == weights.shape


@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_a_divergence_is_selected_with_its_own_fields(divergence):
  config = load(f"loss=ipo,divergence={divergence}")
  assert config.loss.divergence == divergence
  assert ("divergence_alpha" in config.loss) == (divergence == "alpha")
  terms_of(config)
  with pytest.raises(ValueError, match="reads more of the log-ratios than h"):
    build.prepare(load(f"loss=nca,divergence={divergence}"))


@pytest.mark.parametrize(
  ("arg", "overrides", "words"),
  [
    ("loss=dpo+plackett_luce", (), "of different data"),
    ("loss=kto+nll", (), "of different data"),
    ("loss=kto+dpo", (), "of different data"),
    ("loss=bradley_terry", (), "scalar rewards of a reward model"),
    ("loss=simpo", ("ref=frozen",), "ref = 'frozen' has no effect"),
    ("loss=tdpo1", ("ref=cached",), "whole distribution at every token"),
    ("loss=tdpo2", ("ref=none",), "whole distribution at every token"),
    ("loss=dpo", ("ref=base",), "config.lora is not set"),
    ("lora", ("ref=frozen",), "set ref = 'base'"),
    ("ref=ema", ("ref_mix=1.5",), "ref_mix = 1.5 must be in"),
    ("ref=ema", ("ref_every=None",), "ref_every = None with ref = 'ema'"),
    ("lora,ref=ema", (), "ref_mix = 0.6: a mean of adapters' factors"),
    ("loss=exo", ("loss.label_smoothing=0",), "EXO needs it above 0"),
    ("loss=0.5*dpo+nll", ("loss.dpo.beta=0",), "loss.dpo.beta = 0.0 must be"),
    ("loss=discopop", ("loss.temperature=2",), "must be at most 1"),
  ],
)
def test_what_does_not_fit_is_refused(arg, overrides, words):
  with pytest.raises(ValueError, match=words):
    build.prepare(load(arg, *overrides))


@pytest.mark.parametrize(
  "spec", ["dpo+dpo", "x*dpo", "-1*dpo+nll", "2*mpo", ""]
)
def test_wrong_specs_are_refused(spec):
  with pytest.raises(ValueError, match="loss"):
    fields.loss(spec)


def test_a_mixture_of_rankings_may_fine_tune_on_the_best():
  config = load("loss=plackett_luce+0.1*nll")
  assert algos.make(config, apply=None).data == "rankings"
  assert config.loss.nll.weight == 0.1
  assert set(terms_of(config).losses) == {"plackett_luce", "nll"}


def test_the_catalogue_tells_all_of_each_loss(capsys):
  entries = catalogue.entries()
  assert len(entries) >= 30
  assert set(entries) == set(losses.LOSSES)
  for name, entry in entries.items():
    assert any("loss" in line for line in entry["formula"]), name
    assert "arXiv" in entry["source"], name
    assert entry["optimum"], name
    assert bool(entry["dialects"]) == ("dialect" in entry["defaults"]), name
  assert cli.main(["losses"]) == 0
  printed = capsys.readouterr().out
  for name, entry in entries.items():
    assert f"\n{name} " in f"\n{printed}"
    assert entry["formula"][-1].strip() in printed
  assert max(map(len, printed.splitlines())) <= 80


def test_the_catalogue_needs_no_checkout(monkeypatch, tmp_path, capsys):
  monkeypatch.chdir(tmp_path)
  assert cli.main(["losses"]) == 0
  assert "defaults: beta 0.1" in capsys.readouterr().out  # beside the package
