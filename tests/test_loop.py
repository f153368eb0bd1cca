"""The real loop: every config, resuming, signals, one writer, nothing lost."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from configs import common
from dpo_jax import loop
from dpo_jax.config import load as load_lib
from dpo_jax.run import build, feed, held_out
from dpo_jax.train import checkpoint, health, log
from dpo_jax.train import state as state_lib
from tests import conftest, folders

slow = pytest.mark.slow
DRIVER = pathlib.Path(__file__).with_name("driver.py")


def rows_of(workdir, kind="train"):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return [row for row in rows if row["kind"] == kind]


def load(spec="configs/dpo.py:smoke", *overrides):
  return load_lib.load_config(str(conftest.ROOT / spec), overrides)


OTHERS = (
  *("__init__.py", "base.py", "common.py", "losses.py", "paper.py"),  # parts
  "ppo.py",  # its steps are not two, and nothing is held out: algos/rewarded.py
  *("hh.py", "imdb.py", "tldr.py"),  # stages: test_tasks.py
  "frontier_exact.py",  # a study: enumerable/test_study.py
  "frontier_text.py",  # stages: test_frontier_text.py
  "judge.py",  # eval/test_judge.py
  "smollm2.py",  # stages: test_smollm2.py
)
CONFIGS = sorted(
  path.name
  for path in (conftest.ROOT / "configs").glob("*.py")
  if path.name not in OTHERS
)


# Forms that reach a first checkpoint in their own way: adapters without a
# reference, state that is kept between steps, a moving reference, labels.
FORMS = ("dpo.py:smoke,loss=simpo,lora", "dpo.py:smoke,loss=mpo,ref=ema")
SLOW_FORMS = ("sft.py:smoke,lora", "dpo.py:smoke,loss=kto")


@pytest.mark.parametrize(
  "spec",
  [
    *(pytest.param(f"{n}:smoke", marks=slow) for n in CONFIGS),
    *FORMS,
    *(pytest.param(form, marks=slow) for form in SLOW_FORMS),
  ],
)
def test_every_config_trains_two_steps_in_its_smoke_form(spec, tmp_path):
  config = load(f"configs/{spec}")
  config.train.steps = 2
  result = loop.fit(config, tmp_path)
  assert result.exit_code == 0
  assert int(result.state.step) == 2
  train = rows_of(tmp_path)
  assert [row["step"] for row in train] == [1, 2]
  assert all(np.isfinite(list(r.values())[2:]).all() for r in train)
  assert train[1]["tokens_per_second"] > 0
  assert 0 < train[1]["mfu"] < 1
  (evaluation,) = rows_of(tmp_path, "eval")
  assert evaluation["loss"] == result.evaluation["loss"]
  saved = json.loads((tmp_path / "config.json").read_text())
  assert saved == json.loads(json.dumps(config.to_dict()))


def test_bf16_activations_train_and_their_noise_is_printed(tmp_path, capsys):
  overrides = ("model.dtype=bfloat16", "train.steps=3", "log.every=1")
  loop.fit(load("configs/dpo.py:smoke", *overrides), tmp_path)
  losses = [row["loss"] for row in rows_of(tmp_path)]
  # A run refuses rewards beyond 0.1 at step 0, which move the loss by half.
  assert abs(losses[0] - np.log(2)) < 0.05
  assert losses[-1] < 0.6
  assert "step 0: rewards within" in capsys.readouterr().out


def test_dpo_learns_the_toy_task_and_continues_a_finished_run(tmp_path):
  overrides = ("train.steps=12", "eval.every=6", "log.every=1")
  config = load("configs/dpo.py:smoke", *overrides)
  run = build.prepare(config)
  result = loop.fit(config, tmp_path, run)
  losses = [row["loss"] for row in rows_of(tmp_path)]
  assert abs(losses[0] - np.log(2)) < 1e-5
  assert losses[-1] < 0.3
  assert result.evaluation["rewards/accuracies"] > 0.95
  again = loop.fit(config, tmp_path, run)
  assert int(again.state.step) == 12
  longer = (*overrides, "train.steps=14")
  more = loop.fit(load("configs/dpo.py:smoke", *longer), tmp_path)
  assert int(more.state.step) == 14
  assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, 15))


@slow
def test_fewer_steps_than_are_saved_are_refused_and_lose_nothing(tmp_path):
  loop.fit(load("configs/dpo.py:smoke", "train.steps=3"), tmp_path)
  before = (tmp_path / "metrics.jsonl").read_bytes()
  with pytest.raises(ValueError, match="is at step 3 already"):
    loop.fit(load("configs/dpo.py:smoke", "train.steps=2"), tmp_path)
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


@slow
def test_evaluation_does_not_depend_on_devices_or_on_the_last_batch(tmp_path):
  """960 comparisons in batches of 50: the last one has 10."""
  values = []
  meshes = [(), ("mesh.fsdp=2", "mesh.tensor=2"), ("mesh.mode=pmap",)]
  for i, mesh in enumerate(meshes):
    overrides = ("data.batch_size=50", "train.steps=1", "data.eval=toy", *mesh)
    config = load("configs/dpo.py:smoke", *overrides)
    values.append(loop.fit(config, tmp_path / str(i)).evaluation)
  for other in values[1:]:
    for key, value in values[0].items():
      # f32 sums of 960 values in another order, after one RMSprop step.
      np.testing.assert_allclose(other[key], value, rtol=1e-3, atol=1e-4)


@slow
def test_a_run_moves_between_meshes_and_pmap(tmp_path):
  """Both modes share one checkpoint layout; the data go on where they were."""

  def sgd(*overrides):
    # RMSprop turns rounding into updates where gradients vanish.
    config = load("configs/dpo.py:smoke", *often, *overrides)
    with config.unlocked():
      config.optim = common.optim("sgd")
      config.optim.learning_rate, config.optim.warmup = 0.1, 0
    return config.lock()

  often = "log.every=1", "checkpoint.every=2"
  parts = [
    (2, ("mesh.fsdp=2", "mesh.tensor=2")),
    (4, ("mesh.mode=pmap",)),
    (6, ()),
  ]
  for steps, mesh in parts:
    loop.fit(sgd(*mesh, f"train.steps={steps}"), tmp_path / "moved")
  loop.fit(sgd("train.steps=6"), tmp_path / "stayed")
  moved, stayed = (
    [row["logps/chosen"] for row in rows_of(tmp_path / name)]
    for name in ("moved", "stayed")
  )
  assert abs(stayed[-1] - stayed[0]) > 0.1
  np.testing.assert_allclose(moved, stayed, rtol=1e-5)


def test_dpo_starts_from_an_sft_run(tmp_path):
  folders.untrained(load("configs/sft.py:smoke"), tmp_path / "sft")
  init = f"init_from={tmp_path / 'sft'}"
  result = loop.fit(
    load("configs/dpo.py:smoke", init, "train.steps=1", "log.every=1"),
    tmp_path / "dpo",
  )
  reference = result.state.frozen["ref"]
  there = checkpoint.load_params(tmp_path / "sft", reference)
  assert state_lib.fingerprint(there) == state_lib.fingerprint(reference)
  (first,) = rows_of(tmp_path / "dpo")
  assert abs(first["loss"] - np.log(2)) < 1e-5
  misfit = load("configs/dpo.py:smoke", init, "model.mlp=32")
  with pytest.raises(ValueError, match=r"init_from.*mlp/down/kernel"):
    loop.fit(misfit, tmp_path / "misfit")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """Starts the driver in a process of its own, see driver.py.

  All find the programs that the first of them compiled.
  """
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  running = []

  def run(*workdirs, fields=(), kill_at=None, devices=1):
    flags = os.environ["XLA_FLAGS"]  # the last of two is the one that counts
    flags += f" --xla_force_host_platform_device_count={devices}"
    process = subprocess.Popen(
      [
        *(sys.executable, str(DRIVER), ",".join(map(str, workdirs))),
        *(str(kill_at), *fields),
      ],
      env={
        **cache,
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(conftest.ROOT),
      },
      cwd=conftest.ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    running.append(process)
    return process

  yield run
  for process in running:
    process.kill()  # what a failed test left


def finish(process, code=0):
  out, _ = process.communicate(timeout=300)
  assert process.returncode == code, out
  return out


def wait_for_steps(process, metrics, count=3):
  deadline = time.monotonic() + 120
  while not (metrics.exists() and metrics.read_text().count("\n") > count):
    assert time.monotonic() < deadline
    assert process.poll() is None, process.stdout.read()
    time.sleep(0.1)


def final_checksums(workdir, step):
  folder = workdir / "checkpoints" / str(step) / "meta" / "metadata"
  return json.loads(folder.read_text())["checksums"]


def values_of(workdir):
  """Logged values by step, without the clock's."""
  timed = log.TIMED
  return {
    row["step"]: {k: v for k, v in row.items() if k not in timed}
    for row in rows_of(workdir)
  }


@slow
@pytest.mark.parametrize("devices", [1, 8])
def test_a_killed_run_resumes_bit_for_bit_in_a_new_process(
  tmp_path, devices, start
):
  """2N steps = kill -9 after N + a new process, across an epoch's end, with
  accumulation: the same examples, every logged value, every saved bit.

  An epoch of 20 examples ends inside the third batch of 8.
  """
  fields = [
    "data.train=toy:20",
    "train.steps=4",
    "checkpoint.every=2",
    "log.every=1",
    "train.accumulation=2",
    "data.eval=None",
  ]
  if devices == 8:
    fields += ["mesh.fsdp=2", "mesh.tensor=2"]
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  killed = start(whole, cut, fields=fields, devices=devices, kill_at=3)
  finish(killed, -signal.SIGKILL)
  resumed = finish(start(cut, fields=fields, devices=devices))
  assert "steps 2 to 4" in resumed
  ids = {
    name: [
      json.loads(line)
      for line in (tmp_path / name / "ids.jsonl").read_text().splitlines()
    ]
    for name in ("whole", "cut")
  }
  by_step = dict(ids["whole"])
  assert len(by_step) == 4
  for step, examples in ids["cut"]:
    assert examples == by_step[step]
  assert len({i for step in range(2) for i in by_step[step]}) == 16
  assert len({i for step in range(3) for i in by_step[step]}) == 20
  assert values_of(cut) == values_of(whole)
  assert final_checksums(cut, 4) == final_checksums(whole, 4)


@pytest.mark.parametrize(
  ("number", "code"),
  [(signal.SIGTERM, 42), pytest.param(signal.SIGINT, 130, marks=slow)],
)
def test_a_signal_saves_and_the_same_command_resumes(
  tmp_path, number, code, start
):
  fields = ("train.steps=100000", "checkpoint.every=100000", "log.every=1")
  metrics = tmp_path / "metrics.jsonl"
  process = start(tmp_path, fields=fields)
  wait_for_steps(process, metrics)
  with pytest.raises(ValueError, match="in use by another running process"):
    loop.fit(load(), tmp_path)  # meanwhile, a second run in the same folder
  process.send_signal(number)
  assert "the same command resumes" in finish(process, code)
  stopped = rows_of(tmp_path)[-1]["step"]
  process = start(tmp_path, fields=fields)
  for line in process.stdout:
    if f"steps {stopped} to" in line:
      break
  # `train … | tee log`: Ctrl-C ends tee first, and there is no reader any more.
  process.stdout.close()
  wait_for_steps(process, metrics, stopped + 1)
  process.send_signal(signal.SIGINT)
  assert process.wait(timeout=120) == health.EXIT_INTERRUPTED
  steps = [row["step"] for row in rows_of(tmp_path)]
  assert steps == list(range(1, len(steps) + 1))
  assert (tmp_path / "checkpoints" / str(len(steps))).exists()


@pytest.fixture(scope="module")
def eight():
  """(config, base.Run) of eight steps, whose programs are compiled once."""
  overrides = ("train.steps=8", "eval.every=3", "checkpoint.every=4")
  config = load("configs/dpo.py:smoke", *overrides)
  return config, build.prepare(config)


@pytest.mark.parametrize("every", [1, 2])
def test_training_stops_when_nothing_is_finite_and_keeps_what_was_saved(
  tmp_path, every, eight
):
  """Whether the log line is written by a step or by an evaluation."""
  config, run = eight
  rhythm = run.rhythm._replace(log=every, evaluate=2, max_skipped=3)
  broken = {**run.hparams, "learning_rate": np.float32("inf")}
  run = run._replace(rhythm=rhythm, hparams=broken)
  with pytest.raises(
    FloatingPointError, match=r"[34] updates .* nothing was saved"
  ):
    loop.fit(config, tmp_path, run)
  assert rows_of(tmp_path)[-1]["skipped"] >= 3


def interrupted_in(monkeypatch, module, name, number=signal.SIGTERM):
  """Sends this process a signal in the middle of a function, once."""
  right, sent = getattr(module, name), []

  def wrapped(*args, **kwargs):
    if not sent:
      sent.append(os.kill(os.getpid(), number))
    return right(*args, **kwargs)

  monkeypatch.setattr(module, name, wrapped)


@pytest.mark.parametrize("where", ["evaluation", "save"])
def test_a_signal_in_the_middle_of_anything_still_saves(
  where, tmp_path, monkeypatch, eight
):
  config, run = eight
  if where == "evaluation":
    interrupted_in(monkeypatch, held_out, "evaluate")
  else:
    interrupted_in(monkeypatch, checkpoint.Checkpointer, "save")
  result = loop.fit(config, tmp_path, run)
  assert result.exit_code == health.EXIT_REQUEUE
  stopped = int(result.state.step)
  assert stopped == {"evaluation": 4, "save": 5}[where]
  assert (tmp_path / "checkpoints" / str(stopped)).exists()
  resumed = loop.fit(config, tmp_path, run)
  assert int(resumed.state.step) == 8


def test_a_signal_in_the_last_evaluation_ends_the_sweep_it_is_of(
  tmp_path, monkeypatch, eight
):
  config, run = eight
  interrupted_in(monkeypatch, held_out, "evaluate")
  result = loop.fit(config, tmp_path, run._replace(total=2))
  assert int(result.state.step) == 2  # all of them
  assert result.exit_code == health.EXIT_REQUEUE


def test_a_signal_while_data_are_read_stops_at_once(tmp_path, monkeypatch):
  interrupted_in(monkeypatch, feed, "load")
  with pytest.raises(health.Stopped) as caught:
    loop.fit(load("configs/dpo.py:smoke"), tmp_path)
  assert caught.value.exit_code == health.EXIT_REQUEUE
  assert not list(tmp_path.glob("checkpoints/*"))


def test_a_second_signal_takes_its_usual_effect_at_once(request):
  # A shell's background jobs ignore Ctrl-C, and so would this process there.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
  with (  # noqa: PT012 - the second one, and no other, raises
    pytest.raises(KeyboardInterrupt) as caught,
    health.stop_on_signal() as stop,
  ):
    signal.raise_signal(signal.SIGINT)
    assert stop.exit_code == health.EXIT_INTERRUPTED
    signal.raise_signal(signal.SIGINT)
  assert caught.type is not health.Stopped


def test_other_data_under_the_same_name_is_refused(tmp_path):
  data = tmp_path / "my.jsonl"

  def write(word):
    data.write_text(
      "".join(
        json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": word}) + "\n"
        for i in range(8)
      )
    )

  overrides = (f"data.train={data}", "data.eval=None", "train.steps=4")
  config = load("configs/dpo.py:smoke", *overrides)
  write("b")
  folders.untrained(config, tmp_path / "run", step=2)
  write("c")
  with pytest.raises(ValueError, match=r"data_fingerprint \(saved '8 examples"):
    loop.fit(config, tmp_path / "run")
  write("b")
  assert int(loop.fit(config, tmp_path / "run").state.step) == 4


@slow
def test_the_evaluation_is_the_mean_over_all_comparisons(tmp_path):
  """Batches of 50 of 960, the last one smaller, against one batch of all."""
  overrides = ("data.batch_size=50", "train.steps=1", "data.eval=toy")
  result = loop.fit(load("configs/dpo.py:smoke", *overrides), tmp_path)
  config = load("configs/dpo.py:smoke", "data.batch_size=960")
  run = build.prepare(config)
  loader, _ = feed.load(run.setup, run.algorithm, "toy", "data.eval", 1)
  batch = loader.batch(0)[0]
  state = result.state
  batch = run.algorithm.prepare(batch, state.frozen, {})
  terms = run.algorithm.objective(state.params, {}, batch, run.hparams)
  for name in ("rewards/margins", "logps/chosen"):
    values, weights = (np.asarray(x) for x in terms.metrics[name])
    assert weights.sum() == 960
    want = values[weights > 0].mean()
    np.testing.assert_allclose(result.evaluation[name], want, rtol=1e-3)
