"""What stages will take: numbers against those worked out by hand."""

import json

import pytest

from dpo_jax import plan
from dpo_jax.config import load
from dpo_jax.configs import base, common
from dpo_jax.models import config as model_config
from dpo_jax.plan import held as held_lib
from dpo_jax.plan import known, table
from dpo_jax.run import build, memory
from dpo_jax.train import optim
from tests.models import published

NAME = "EleutherAI/pythia-70m"
# Of its config.json: L, D, F, V, and N·H = D; no two matrices are tied.
LAYERS, EMBED, MLP, VOCAB = 6, 512, 2048, 50304
PARAMETERS = 70_426_624  # of the published model
RECORDS = (("pairs.jsonl", 1000, 100, 50),)


def config_of(**fields):
  c = base.get_config()
  common.pretrained(c, f"hf:{NAME}")
  c.data.train, c.ref, c.data.batch_size = "pairs.jsonl", "cached", 64
  c.workdir = "runs/x"
  for name, value in fields.items():
    section, _, field = name.replace("__", ".").rpartition(".")
    node = c[section] if section else c
    node[field] = value
  return c.lock()


def row_of(config, verb="train", points=1, devices=1, others=()):
  stage = plan.Stage(verb, "one", config, points)
  options = common.planned(devices, *RECORDS)
  return plan.rows([*others, stage], options)[-1]


def forward(examples, prompt=100, completion=50, completions=2, head=True):
  """FLOPs of one pass, two a multiply-add, written out."""
  tokens = examples * (prompt + completions * completion)
  scored = examples * completions * completion
  weights = LAYERS * (4 * EMBED * EMBED + 2 * EMBED * MLP)
  whole = prompt + completion
  seen = prompt * (prompt + 1) / 2
  seen += completions * (whole * (whole + 1) - prompt * (prompt + 1)) / 2
  attention = 4 * EMBED * LAYERS * examples * seen  # q·k and p·v
  return 2 * weights * tokens + 2 * EMBED * VOCAB * scored * head + attention


def test_dpo_with_a_cached_reference_by_hand():
  row = row_of(config_of())
  assert row.examples == 1024  # 16 steps of 64, of 1,000 records
  assert row.tokens == 1024 * 200
  # Forward, and backward to activations and weights; the reference's once.
  assert row.flops == pytest.approx(3 * forward(1024) + forward(1000))
  assert row.drawing == 0
  # Parameters, gradient and its copy, RMSprop's one moment: f32.
  assert row.memory == 16 * PARAMETERS


def test_a_reference_beside_the_policy_costs_a_pass_and_a_copy():
  row = row_of(config_of(ref="frozen"))
  assert row.flops == pytest.approx(4 * forward(1024))
  assert row.memory == 20 * PARAMETERS


def test_moments_in_bf16_and_more_devices_need_less_of_each():
  assert row_of(config_of(optim__moments="bfloat16")).memory == pytest.approx(
    14 * PARAMETERS, rel=1e-6
  )
  split = config_of(mesh__fsdp=2, mesh__tensor=2)
  # Norms and biases are whole on every device.
  assert row_of(split, devices=4).memory == pytest.approx(
    4 * PARAMETERS, rel=2e-3
  )


def test_a_mesh_that_cannot_be_is_said_in_the_row():
  row = row_of(config_of(mesh__fsdp=3), devices=3)
  assert "does not divide over mesh axis 'fsdp' of size 3" in row.unknown
  row = row_of(config_of(mesh__fsdp=2), devices=3)
  assert "do not make up the 3 devices of plan.devices" in row.unknown


def test_an_adapter_trains_few_weights_on_a_frozen_base():
  c = config_of(ref="base", lora=common.lora())
  row = row_of(c)
  less = 2 * LAYERS * (4 * EMBED * EMBED + 2 * EMBED * MLP) * 1024 * 200
  less += 2 * EMBED * VOCAB * 1024 * 100
  # No gradient of the weights; those of attention stay, as the reference's.
  assert row.flops == pytest.approx(4 * forward(1024) - less)
  # r · (inputs + outputs) of q, k, v, o, up and down; four bytes, four times.
  adapter = 16 * LAYERS * (4 * 2 * EMBED + 2 * (EMBED + MLP))
  assert row.memory == 4 * PARAMETERS + 16 * adapter


def test_sft_reads_one_completion_and_a_reward_no_vocabulary():
  sft = config_of(algo="sft", ref="none", loss=common.loss("sft"))
  one = forward(1024, completions=1)
  assert row_of(sft).flops == pytest.approx(3 * one)
  loss = common.loss("bradley_terry")
  reward = row_of(config_of(algo="reward", ref="none", loss=loss))
  assert reward.flops == pytest.approx(3 * forward(1024, head=False))
  assert reward.memory == 16 * (PARAMETERS + EMBED + 1)  # and its head


def test_a_sweep_has_as_many_runs_and_samples_the_reference_too():
  prompts = {"sample__prompts": "pairs.jsonl", "sample__count": 32}
  swept = row_of(config_of(**prompts), "sweep", points=4)
  drawn = forward(32, completion=64, completions=1)
  assert swept.examples == 4 * 1024
  assert swept.drawing == pytest.approx(5 * drawn)
  # The KL of each of the samples is a pass of policy and reference.
  trained = 4 * 3 * forward(1024) + forward(1000)
  assert swept.flops == pytest.approx(trained + 5 * 2 * drawn)
  # Every fifth of the 16 steps, and the last: 5, 10, 15 and 16.
  often = {"sample__checkpoints": True, "checkpoint__every": 5}
  kept = config_of(**prompts, **often, checkpoint__keep=9)
  assert row_of(kept, "sweep", points=4).drawing == pytest.approx(17 * drawn)
  few = config_of(**prompts, **often, checkpoint__keep=2)
  assert row_of(few, "sweep", points=4).drawing == pytest.approx(9 * drawn)
  cold = config_of(**prompts, sample__temperature=0.5)
  assert row_of(cold, "sweep", points=4).flops == pytest.approx(trained)


def test_rollouts_are_drawn_measured_scored_and_trained_on():
  reward = config_of(algo="reward", ref="none", workdir="runs/rm")
  c = config_of(
    **{"algo": "policy_gradient", "ref": "frozen", "data.packed": False},
    **{"loss": common.policy_gradient("ppo"), "rollout": common.rollout()},
    **{"data.max_completion_length": 40, "train.steps": 12},
  )
  with c.unlocked():
    c.rollout.scorer = "reward:runs/rm"
    c.rollout.prompts = c.rollout.batch_size = 128
  row = row_of(c, others=[plan.Stage("train", "rm", reward, 1)])
  # An iteration has two minibatches, four times over: two of them in 12 steps.
  once = forward(256, completion=40, completions=1)
  assert row.examples == 256
  assert row.drawing == pytest.approx(once)
  scored = forward(256, completion=40, completions=1, head=False)
  assert row.flops == pytest.approx(4 * 3 * once + 2 * once + scored)
  keys_and_values = 2 * LAYERS * EMBED * 4 * 128 * 140
  controller = 5 * 4  # numbers that PPO keeps between steps
  held = 20 * PARAMETERS + 16 * (EMBED + 1) + controller
  assert row.memory == held + keys_and_values


def test_what_an_earlier_stage_will_write_has_its_sizes_and_shape():
  pairs = config_of(
    **{"sample.prompts": "pairs.jsonl", "sample.count": 128},
    **{"sample.draws": 4, "sample.max_new_tokens": 20, "workdir": "runs/pairs"},
  )
  c = config_of(init_from="runs/pairs", data__train="runs/pairs/pairs.jsonl")
  before = plan.Stage("sample", "pairs", pairs, 1)
  row = row_of(c, others=[before])
  assert row.examples == 128
  assert row.tokens == 128 * (100 + 4 * 20)
  prefixed = load.at(pairs, {"sample.prefix": (2, 8)})
  assert row_of(prefixed, "sample").tokens == 128 * (5 + 4 * 20)


def test_a_mixture_has_the_records_of_its_parts_by_their_weights():
  both = "2*pairs.jsonl + 0.5*pairs.jsonl"
  row = row_of(config_of(data__train=both))
  assert row.examples == -(-2500 // 64) * 64
  assert row.tokens == row.examples * 200


def test_lengths_are_cut_as_training_cuts_them():
  short = config_of(data__max_prompt_length=10, data__max_completion_length=5)
  assert row_of(short).tokens == 1024 * (10 + 2 * 5)


def test_what_is_not_known_is_said_in_the_row(tmp_path):
  row = row_of(config_of(data__train="hf:nobody/pairs"))
  assert "how many records hf:nobody/pairs has" in row.unknown
  assert "plan.records" in row.unknown
  c = config_of(init_from="hf:nobody/model")
  assert "the shape of hf:nobody/model is not known" in row_of(c).unknown
  text = table.text([row_of(c), row_of(config_of())], common.planned(1))
  assert "not known: the shape of hf:nobody/model" in text
  assert "1,024" in text.splitlines()[-2]  # the sum is of what is known
  # Where updates are counted, the records need not be.
  counted = config_of(data__train="hf:nobody/pairs", train__steps=2)
  assert row_of(counted).examples == 128


def test_a_local_checkpoint_and_file_are_read_where_they_are(tmp_path):
  raw = {**published.PUBLISHED[NAME], "num_hidden_layers": 3}
  (tmp_path / "config.json").write_text(json.dumps(raw))
  line = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
  (tmp_path / "my.jsonl").write_text(f"{line}\n" * 70)
  c = load.at(
    config_of(),
    {"data.train": str(tmp_path / "my.jsonl"), "init_from": f"hf:{tmp_path}"},
  )
  row = row_of(c)
  assert row.examples == 128
  assert row.tokens == 128 * 3 * 256  # the limits: nothing else is known
  assert row.memory < 16 * PARAMETERS


@pytest.mark.parametrize(
  "spec", ["dpo:", "dpo:lora,", "dpo:ref=cached,", "reward:", "ppo:", "sft:"]
)
def test_memory_is_what_a_run_counts_before_its_activations(spec):
  c = load.load_config(
    f"{spec}smoke", ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
  )
  setup = build.prepare_model(c)
  optimizer = optim.make(c.optim, 2)
  model = known.Model(setup.model.config, setup.model.vocab_size)
  extra = build.algorithm_of(c, setup).extra
  counted = memory.of_state(setup, optimizer, extra)
  assert held_lib.state(c, model, 2, 8) == counted


def test_hours_rest_on_the_shares_of_the_peak_that_are_named():
  options = common.planned(2, *RECORDS)
  stage = plan.Stage("train", "one", config_of(), 1)
  flops = 2 * 989e12 * 3600
  row = plan.Row(stage, 1, 1, flops=0.3 * flops, drawing=0.04 * flops)
  lines = table.text([row], options).splitlines()
  assert lines[1].split()[-1] == "3.00"  # 1 hour of training, 2 of drawing
  assert "2 × H100 at 989 TFLOP/s" in lines[-1]
  assert "30% of it (plan.mfu)" in lines[-1]
  assert "2.0% (plan.sampling)" in lines[-1]
  options.device = "H300"
  with pytest.raises(ValueError, match=r"plan\.device.*did you mean 'H[12]00'"):
    table.text([row], options)
  options.device, options.mfu = "A100", 0.0
  with pytest.raises(ValueError, match=r"plan\.mfu = 0\.0 is a share"):
    table.text([row], options)


def test_windows_bound_what_is_seen():
  c = model_config.ModelConfig(
    **{"layers": 2, "embed": 8, "heads": 1, "kv_heads": 1, "head_dim": 8},
    **{"mlp": 8, "max_positions": 64, "layer_pattern": ("full", "window")},
    window=4,
  )
  batch = known.Batch(1, 10, 0, 1)
  # 1 + 2 + … + 10, and 1 + 2 + 3 + 4 · 7.
  assert batch.counts(c)[2] == 55 + 34
