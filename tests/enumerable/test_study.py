"""A study from its config to its verdicts, in small."""

import json

import jax
import numpy as np
import pytest

from dpo_jax import cli, report
from dpo_jax.config import load
from dpo_jax.enumerable import build, programs, study, worlds
from dpo_jax.enumerable import language as language_lib
from dpo_jax.report import claims
from tests import conftest

# The study of `folder` is made once.
pytestmark = pytest.mark.xdist_group("study")

FILE = f"{conftest.ROOT}/configs/frontier_exact.py"
POINTS = [
  *({"arg": "method=dpo", "loss.beta": beta} for beta in (0.1, 1.0, 3.0)),
  {"arg": "method=ppo_gt", "rollout.kl_target": 1.0},
]


def source_of(*overrides):
  return load.load(f"{FILE}:smoke", overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A study of the smoke form, done."""
  path = tmp_path_factory.mktemp("study")
  study.run(POINTS, source_of().at, path)
  return path


def test_every_method_of_the_config_is_one_that_a_study_can_have():
  source = source_of()
  module = source.module
  points = list(module.sweep())
  assert {p["arg"].split("=")[1] for p in points} == set(module.METHODS) - {
    *study.STAGES
  }
  study.check([source.at(point) for point in points])


def test_it_leaves_the_curves_of_every_seed(folder):
  about = json.loads((folder / "study.json").read_text())
  assert [world["seed"] for world in about["worlds"]] == [0, 1]
  dpo = json.loads((folder / "bradley_terry" / "dpo.json").read_text())
  assert [(run["seed"], run["setting"]) for run in dpo["runs"]] == [
    (seed, {"loss.beta": beta}) for seed in (0, 1) for beta in (0.1, 1.0, 3.0)
  ]
  for run in dpo["runs"]:
    assert run["steps"][-1] == 24
    assert run["kl"][-1] > run["kl"][0] > 0
    assert run["reward"][-1] > about["worlds"][0]["reference"]["reward"]
  assert (folder / "true" / "ppo_gt.json").exists()


def test_what_is_done_is_not_done_again(folder, capsys):
  before = (folder / "true" / "ppo_gt.json").read_bytes()
  study.run(POINTS, source_of().at, folder)
  assert capsys.readouterr().out.count("done before, skipped") == 3
  assert (folder / "true" / "ppo_gt.json").read_bytes() == before


@pytest.mark.slow
def test_what_is_missing_is_done_alone_and_the_same_however_it_is_cut(folder):
  path = folder / "deterministic" / "dpo.json"
  before = json.loads(path.read_text())
  path.unlink()
  other = source_of("study.lanes=3", "study.workers=1")
  study.run(POINTS, other.at, folder)
  after = json.loads(path.read_text())
  for new, old in zip(after["runs"], before["runs"], strict=True):
    assert (new["seed"], new["setting"]) == (old["seed"], old["setting"])
    for name in ("kl", "reward"):  # another program rounds otherwise
      np.testing.assert_allclose(new[name], old[name], rtol=1e-3, atol=1e-6)


def test_a_folder_of_another_config_is_refused(folder):
  with pytest.raises(ValueError, match="another config"):
    study.run(POINTS, source_of("optim.warmup=3").at, folder)


def test_its_report_has_the_claims_and_says_what_is_not_done(folder):
  page = report.write(folder)
  assert "Does DPO dominate?" in page.read_text()
  said = json.loads((folder / "frontier.json").read_text())
  verdicts = {row["against"]: row["verdict"] for row in said["comparisons"]}
  assert verdicts["ppo"] == "not done"
  assert verdicts["best_of"] in ("not reproduced", "on par", "reproduced")
  (trend,) = [t for t in said["trends"] if t["labels"] == "bradley_terry"]
  assert trend["betas"] == [3.0, 1.0, 0.1]
  assert (folder / "frontier.png").stat().st_size > 10_000
  assert "Does β control the KL?" in report.text(folder)
  # Two seeds and eight comparisons: 8 · 2⁻² is no p at all.
  assert "no p after Holm is below 1," in report.text(folder)


def test_the_seeds_of_the_whole_form_can_show_something():
  options = load.load(FILE, ()).config.study
  about = {
    "options": options.to_dict(),
    "worlds": [{"seed": seed} for seed in options.seeds],
  }
  assert claims.powerless(claims.Study(about, {}, [])) is None
  about["worlds"].pop()
  assert "9 seeds and 8" in claims.powerless(claims.Study(about, {}, []))


@pytest.mark.parametrize(
  ("override", "said"),
  [
    ("sample.count=3", "sample.count = 3 has no effect"),
    ("train.steps=None", "train.steps = None"),
  ],
)
def test_what_a_study_cannot_have_is_refused(override, said, tmp_path):
  with pytest.raises(ValueError, match=said):
    study.run(POINTS, source_of(override).at, tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("field", "value", "said"),
  [
    ("rollout.scorer", "vader", "learned, true"),
    ("rollout.kl_target", None, "target KL"),
    ("train.steps", 23, "no multiple of the 4 steps"),
  ],
)
def test_a_sampling_method_that_cannot_be_is_refused(field, value, said):
  config = source_of().at({"arg": "method=ppo"})
  section, name = field.split(".")
  config[section][name] = value
  if value is None:
    config.rollout.kl_horizon = None
  with pytest.raises(ValueError, match=said):
    study.check([config])


def test_a_study_is_no_run_to_train(capsys, tmp_path):
  words = ["train", "--config", f"{FILE}:smoke", f"--workdir={tmp_path}"]
  assert cli.main(words) == 2
  assert "`dpo-jax sweep` does it" in capsys.readouterr().err


def test_methods_that_differ_in_numbers_share_their_programs():
  source, made = source_of(), {}
  language = build.language_of(source.config)
  configs = {p["arg"]: source.at(p) for p in source.module.sweep()}
  of = {
    arg: build.programs_of(config, language, made)
    for arg, config in configs.items()
  }
  assert of["method=dpo"] is of["method=cdpo"]
  assert of["method=ppo"] is of["method=ppo_gt"]
  assert of["method=dpo"] is not of["method=ipo"]


def test_what_is_sampled_is_of_the_policy():
  source = source_of()
  config = source.at({"arg": "method=ppo_gt"})
  language = build.language_of(config)
  method = build.programs_of(config, language, {}).method
  params = jax.jit(method.init)(jax.random.key(0))
  batch = language_lib.prefixes(language)

  @jax.jit
  def drawn(params, rngs):
    tokens = jax.vmap(
      lambda rng: programs.sampled(method, params, rng)["tokens"]
    )(rngs)
    said = tokens[..., 1:].reshape(-1, language.length)
    prompts = np.repeat(method.batch["tokens"][:, 0], method.drawing.draws)
    own = language_lib.log_policy(language, method.apply, params, batch)
    number = language_lib.number_of(said, language.words)
    return number.reshape(len(rngs), -1), prompts, own

  rngs = jax.random.split(jax.random.key(1), 60)
  number, prompts, own = map(np.asarray, drawn(params, rngs))
  for x in range(language.prompts):
    counts = np.bincount(number[:, prompts == x].ravel(), minlength=64)
    expected = counts.sum() * np.exp(own[x])
    chi = np.sum((counts - expected) ** 2 / expected)
    assert counts.sum() > 3000
    assert abs(chi - 63) < 4 * np.sqrt(126)  # of χ²_63


def test_learned_scores_are_centred_for_every_prompt():
  rng = np.random.default_rng(0)
  log_ref = np.log(rng.dirichlet(np.ones(9), 2))
  scores = worlds.centred(rng.normal(3.0, 5.0, (2, 9)), log_ref)
  p = np.exp(log_ref)
  np.testing.assert_allclose(np.sum(p * scores, axis=-1), 0, atol=1e-6)
  assert np.sum(p * scores**2) / 2 == pytest.approx(1, rel=1e-6)


@pytest.mark.slow
def test_a_signal_keeps_what_is_done(tmp_path):
  broken = [*POINTS[:3], {"arg": "method=ipo", "loss.beta": 0.1}]
  real = study._trainer

  def trainer(job, options, made):
    if job.name == "ipo":
      raise KeyboardInterrupt
    return real(job, options, made)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(study, "_trainer", trainer)
    with pytest.raises(KeyboardInterrupt):
      study.run(broken, source_of().at, tmp_path)
  assert (tmp_path / "bradley_terry" / "dpo.json").exists()
  assert claims.read(tmp_path).missing == [
    "bradley_terry/ipo",
    "deterministic/ipo",
  ]


OTHERS = {
  "grid": [0.3, 0.35],
  "near": 0.001,
  "method": "ppo_gt",
  "against": ["best_of"],
  "level": 0.999,
  "margin": 1.0,
  "resamples": 500,
  "seed": 1,
  "trend": "ipo",
}


def test_every_field_of_the_claims_decides_what_is_said(folder, monkeypatch):
  # Of two seeds all intervals are alike.
  monkeypatch.setattr(
    claims.statistics,
    "interval",
    lambda values, *, resamples, seed: (
      values.mean() + 1e-6 * seed,
      values.mean() + 1e-8 * resamples,
    ),
  )
  study_of = claims.read(folder)
  # At a KL that all pass, so that there is something to decide.
  before = study_of.claims | {"grid": [0.3], "near": 0.5, "level": 0.3}
  assert before.keys() == OTHERS.keys()

  def said(**changes):
    options = study_of.options | {"claims": before | changes}
    about = study_of.about | {"options": options}
    out = claims.summary(study_of._replace(about=about))
    return json.dumps({k: v for k, v in out.items() if k != "options"})

  first = said()
  for name, value in OTHERS.items():
    assert said(**{name: value}) != first, name


def test_every_other_field_of_a_study_decides_what_is_done():
  def plan(config):
    options = build.options_of(config)
    language = build.language_of(config)
    points = [study.Point({}, {})]
    method = build.programs_of(config, language, {}).method
    rates = options.rates
    job = study.Job("dpo", "deterministic", None, points, rates, {})
    compared = language_lib.compared(
      *(language, language.demonstrations),
      groups=options.groups,
      draws=options.draws,
      labels=options.labels[0],
      scale=options.label_scale,
      seed=options.seeds[0],
    )
    tuning, count = study._lanes(job, options)
    return [
      *(tuning, count, options.seeds, options.labels, options.best_of),
      *(study.checkpoints(method, options.checkpoints), options.lanes),
      options.workers,
      *(x.tolist() for x in (*compared, language.reward)),
    ]

  source = source_of()
  first = plan(source.config)
  for path, value in {
    "study.seeds": (3,),
    "study.tuning_seeds": (101, 102),
    "study.rates": (0.1, 0.2),
    "study.labels": ("deterministic",),
    "study.label_scale": 0.5,
    "study.groups": 65,
    "study.draws": 3,
    "study.best_of": (2,),
    "study.checkpoints": 5,
    "study.lanes": 3,
    "study.workers": 5,
    "language.words": 5,
    "language.length": 4,
    "language.prompts": 3,
    "language.seed": 1,
  }.items():
    assert plan(load.at(source.config, {path: value})) != first, path


@pytest.mark.slow
def test_the_smoke_form_runs_from_the_command_line(tmp_path, capsys):
  """All methods, in a few steps, to a report of every claim."""
  workdir = f"--workdir={tmp_path}"
  spec = f"{FILE}:smoke"
  assert cli.main(["sweep", "--config", spec, workdir]) == 0
  said = capsys.readouterr().out
  assert "Does β control the KL?" in said
  study_of = claims.read(tmp_path)
  assert not study_of.missing
  for labels in study_of.options["labels"]:
    rows = claims.comparisons(study_of, labels)
    assert [r["against"] for r in rows] == [*study_of.claims["against"]]
    assert "not done" not in {row["verdict"] for row in rows}
  assert cli.main(["report", workdir]) == 0
  assert "Does β control the KL?" in capsys.readouterr().out
