"""The sampler: whom it draws, when it stops, and what it does not depend on."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_dict

from dpo_jax.algos import base
from dpo_jax.data.tokens import comparisons
from dpo_jax.models import axes, decoder, sample
from dpo_jax.models import config as config_lib
from dpo_jax.ops import reduce
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run
from tests import worlds
from tests.models import parity

VOCAB, EOS = 7, 4
# One shape for all tests, so that they share one program.
B, T, N = 64, 3, 6
PROMPTS = jax.random.randint(jax.random.key(5), (B, T), 0, VOCAB)
LENGTHS = jnp.int32([1, 3, 2, 3] * (B // 4))
IDS = jnp.arange(B)


@functools.cache
def world():
  """(decoder.Model, params, the compiled sampler) of seven tokens."""
  model = decoder.build(worlds.MODELS["llama"], VOCAB)
  params = worlds.noisy(jax.jit(model.init)(jax.random.key(0)), 1, 0.3)
  return model, params, sample.compiled(model)


def draw(
  prompts=PROMPTS,
  lengths=LENGTHS,
  ids=IDS,
  *,
  seed=2,
  new=N,
  temperature=1.0,
  top_p=1.0,
  end_ids=(EOS,),
  stops=(),
):
  _, params, compiled = world()
  return compiled(
    params,
    prompts,
    lengths,
    ids,
    jax.random.key(seed),
    max_new_tokens=new,
    temperature=temperature,
    top_p=top_p,
    end_ids=end_ids,
    stops=stops,
  )


@functools.cache
def prompt_logits():
  """Logits [B, T, V] of the prompts, without the sampler."""
  model, params, _ = world()
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  decode = jax.jit(model.decode)
  cache = model.init_cache(B, T)
  logits, _ = decode(params, PROMPTS, positions, cache)
  return np.asarray(logits)[..., :VOCAB]


MANY = 20_000


def first_tokens(temperature, top_p):
  """MANY Samples of one token after the first two of PROMPTS[0]; no end."""
  prompts = jnp.tile(PROMPTS[:1], (MANY, 1))
  return draw(
    prompts,
    jnp.full(MANY, 2),
    jnp.arange(MANY),
    seed=1,
    new=1,
    temperature=temperature,
    top_p=top_p,
    end_ids=(),
  )


@pytest.mark.parametrize(
  ("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.6)]
)
def test_sample_frequencies_match_the_softmax(temperature, top_p):
  """χ² of 20,000 first tokens against the exact distribution."""
  probs = np.array(jax.nn.softmax(prompt_logits()[0, 1] / temperature))
  order = np.argsort(-probs)
  keep = np.cumsum(probs[order]) - probs[order] < top_p
  probs[order[~keep]] = 0
  probs /= probs.sum()
  out = first_tokens(temperature, top_p)
  assert not out.finished.any()  # though some are EOS
  seen = np.bincount(out.tokens[:, 0], minlength=VOCAB)
  assert seen.shape == (VOCAB,)  # no padded column is ever drawn
  assert seen[probs == 0].sum() == 0
  expected = MANY * probs[probs > 0]
  chi2 = float(np.sum((seen[probs > 0] - expected) ** 2 / expected))
  # 99.9% quantiles of χ² with 1 … 6 degrees of freedom.
  quantile = [10.83, 13.82, 16.27, 18.47, 20.52, 22.46]
  assert chi2 < quantile[len(expected) - 2]


def logps_of(samples, temperature):
  """[log-probs of its tokens] of each sample, by the pass that trains."""
  model, params, _ = world()

  def apply(params, batch):
    hidden, head = model.apply(params, batch)
    return hidden, head.replace(temperature=temperature)

  items = [
    comparisons.Example(i, 0, prompt[:length], (tokens[:end],), ())
    for i, (prompt, length, tokens, end) in enumerate(
      zip(
        PROMPTS.tolist(),
        LENGTHS.tolist(),
        samples.tokens.tolist(),
        samples.lengths.tolist(),
        strict=True,
      )
    )
  ]
  batch = worlds.batch(items, packed=False)
  run = jax.jit(functools.partial(base.token_logps, apply))
  by_key = parity.by_completion(run(params, batch), batch)
  return [by_key[i, 0] for i in range(B)]


@pytest.mark.parametrize(
  ("temperature", "top_p", "scale"),
  [(1.0, 1.0, 1.0), (0.7, 0.9, 0.7), (0.0, 1.0, 1.0)],
)
def test_samples_stop_at_eos_and_report_their_log_probs(
  temperature, top_p, scale
):
  """At the temperature they were drawn at, over all tokens; 1 for greedy."""
  out = draw(temperature=temperature, top_p=top_p)
  assert out.finished.any()
  assert not out.finished.all()
  for i in range(B):
    n = int(out.lengths[i])
    drawn = out.tokens[i, :n].tolist()
    assert (EOS in drawn) == bool(out.finished[i])
    assert bool(out.finished[i]) or n == N
    assert EOS not in drawn[:-1]
    assert set(out.tokens[i, n:].tolist()) <= {EOS}
    assert not np.any(out.logps[i, n:])
  for got, want in zip(out.logps, logps_of(out, scale), strict=True):
    # The noise floor of a ratio: f32 sums in another order, logits of order 1.
    np.testing.assert_allclose(got[: len(want)], want, rtol=0, atol=1e-5)


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
  """Halves are exact: one reaches ½, and a second is one too many."""
  even = jnp.float32([[0.0, 0.0, -1e9], [-1e9, 0.0, 0.0]])
  assert (sample.nucleus(even, 0.5) > -1e8).sum(axis=-1).tolist() == [1, 1]
  assert (sample.nucleus(even, 0.51) > -1e8).sum(axis=-1).tolist() == [2, 2]


def test_the_nucleus_of_a_vocabulary_is_that_of_its_sorted_tokens():
  """By a float64 sort; ties go to the first, as in a stable one."""
  logits = jnp.round(4 * jax.random.normal(jax.random.key(3), (20, 640))) / 4
  probs = np.asarray(jax.nn.softmax(logits), np.float64)
  order = np.argsort(-probs, axis=-1, kind="stable")
  ranked = np.take_along_axis(probs, order, axis=-1)
  before = np.cumsum(ranked, axis=-1) - ranked
  for top_p in (0.2, 0.9):
    assert np.abs(before - top_p).min() > 1e-6  # no rounding decides
    want = np.zeros(probs.shape, bool)
    np.put_along_axis(want, order, before < top_p, axis=-1)
    np.testing.assert_array_equal(sample.nucleus(logits, top_p) > -1e8, want)


def test_blocks_of_columns_are_drawn_as_the_softmax_has_them():
  """χ² of 20,000 draws from five blocks, likely tokens one by one."""
  logits = jax.random.normal(jax.random.key(8), (5 * 128,)) * 2
  logits = logits.at[128:256].set(-1e30)  # as of padding: never drawn
  keys = jax.random.split(jax.random.key(9), MANY)
  rows = jnp.broadcast_to(logits, (MANY, logits.size))
  tokens = jax.jit(sample.pick)(rows, keys, jnp.bool(False))
  seen = np.bincount(tokens, minlength=logits.size)
  expected = MANY * np.asarray(jax.nn.softmax(logits), np.float64)
  assert seen[128:256].sum() == 0
  likely = expected > 20
  seen, expected = (
    np.append(x[likely], x[~likely].sum()) for x in (seen, expected)
  )
  freedom = len(seen) - 1
  chi2 = float(np.sum((seen - expected) ** 2 / expected))
  assert freedom > 100
  assert chi2 < freedom + 4 * (2 * freedom) ** 0.5  # its mean + 4 sd
  greedy = jax.jit(sample.pick)(rows[:2], keys[:2], jnp.bool(True))
  assert greedy.tolist() == [int(jnp.argmax(logits))] * 2


def test_successive_tokens_are_drawn_by_noise_of_their_own():
  """Of equal logits: two tokens agree as often as two throws of a die."""
  _, params, compiled = world()
  flat = jax.tree.map(jnp.zeros_like, params)
  out = compiled(
    *(flat, PROMPTS, LENGTHS, IDS, jax.random.key(2)),
    max_new_tokens=N,
    temperature=1.0,
    top_p=1.0,
    end_ids=(),
  )
  equal = out.tokens[:, 1:] == out.tokens[:, :-1]
  error = (1 / VOCAB * (1 - 1 / VOCAB) / equal.size) ** 0.5
  assert abs(float(equal.mean()) - 1 / VOCAB) < 4 * error


def test_any_of_several_ends_stops_a_sample_and_the_first_fills_up():
  """As one of them does, cut at whichever came first."""
  endless = np.asarray(draw(end_ids=()).tokens)
  out = draw(end_ids=(EOS, 2))
  seen = set()
  for i, tokens in enumerate(endless.tolist()):
    ends = [k for k, token in enumerate(tokens) if token in (EOS, 2)]
    n = ends[0] + 1 if ends else N
    assert int(out.lengths[i]) == n
    assert bool(out.finished[i]) == bool(ends)
    assert out.tokens[i].tolist() == tokens[:n] + [EOS] * (N - n)
    seen |= {tokens[n - 1]} if ends else set()
  assert seen == {EOS, 2}


def test_ids_that_end_a_sample_together_do_so_where_they_are_whole():
  """Behind the last of them; longer ones than a sample end none."""
  endless = np.asarray(draw(end_ids=()).tokens)
  twice = [tuple(row[k : k + 2]) for row in endless.tolist() for k in (0, 3)]
  stops = max(twice, key=twice.count), (5, 5, 5), (1,) * (N + 1)
  out = draw(end_ids=(EOS,), stops=stops)
  seen = 0
  for i, tokens in enumerate(endless.tolist()):
    ends = [
      n
      for n in range(1, N + 1)
      if tokens[n - 1] == EOS
      or any(tuple(tokens[max(0, n - len(s)) : n]) == s for s in stops)
    ]
    n = min(ends, default=N)
    assert int(out.lengths[i]) == n
    assert bool(out.finished[i]) == bool(ends)
    assert out.tokens[i].tolist() == tokens[:n] + [EOS] * (N - n)
    seen += bool(ends) and tokens[n - 1] != EOS
  assert seen > 3


def test_temperature_zero_takes_the_most_likely_token():
  first = np.asarray(draw(temperature=0.0).tokens[:, 0])
  last = prompt_logits()[np.arange(B), np.asarray(LENGTHS) - 1]
  np.testing.assert_array_equal(first, np.argmax(last, axis=-1))


def test_sampling_compiles_once_per_shape():
  """One each for the draws of two shapes, at every temperature and top-p."""
  _, _, compiled = world()
  compiled.clear_cache()
  for temperature, top_p in ((1.0, 1.0), (0.5, 0.9)):
    draw(temperature=temperature, top_p=top_p)
  first_tokens(0.5, 0.9)
  assert compiled._cache_size() == 2


def test_a_sample_does_not_depend_on_its_batch():
  """Neither on its place in it, nor on the others."""
  want = draw()
  back = IDS[::-1]
  turned = draw(PROMPTS[back], LENGTHS[back], IDS[back])
  for got, x in zip(turned, want, strict=True):
    np.testing.assert_array_equal(got[back], x)
  even = IDS % 2 == 0
  among_others = draw(
    jnp.where(even[:, None], PROMPTS, (PROMPTS + 1) % VOCAB),
    jnp.where(even, LENGTHS, T),
    jnp.where(even, IDS, IDS + B),
  )
  for got, x in zip(among_others, want, strict=True):
    np.testing.assert_array_equal(got[even], x[even])
  assert np.any(among_others.tokens[~even] != want.tokens[~even])


def test_draws_of_one_prompt_are_those_of_single_draws():
  """The prompt is computed once, and nothing else changes."""
  some = slice(0, B // 4)
  got = draw(PROMPTS[some], LENGTHS[some], IDS)
  want = draw(
    jnp.repeat(PROMPTS[some], 4, axis=0), jnp.repeat(LENGTHS[some], 4), IDS
  )
  for a, b in zip(got[:3], want[:3], strict=True):
    np.testing.assert_array_equal(a, b)
  # Products of other shapes: f32 sums in another order.
  np.testing.assert_allclose(got.logps, want.logps, rtol=0, atol=1e-5)
  with pytest.raises(ValueError, match="64 example_ids are not as many for"):
    draw(PROMPTS[:7], LENGTHS[:7], IDS)


def test_padding_of_the_prompts_changes_no_draw():
  want = draw()
  got = draw(jnp.pad(PROMPTS, ((0, 0), (0, 5)), constant_values=6))
  for a, b in zip(got[:3], want[:3], strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_allclose(got.logps, want.logps, rtol=0, atol=1e-5)


def lowered(model, params):
  """The optimised program of a model's sampler, as text."""
  arguments = params, PROMPTS[:4], LENGTHS[:4], IDS[:4], jax.random.key(0)
  options = {"temperature": 1.0, "top_p": 1.0, "end_ids": (EOS,)}
  program = sample.compiled(model).lower(
    *arguments, max_new_tokens=N, **options
  )
  return program.compile().as_text()


def test_no_loop_over_tokens_copies_weights_or_a_cache_of_all_layers(
  monkeypatch,
):
  """A layer's weights and cache are read where they are."""
  model, params, _ = world()
  c = model.config
  stacked = f"f32[{c.layers},"
  weights = [
    f"f32[{c.embed},{c.mlp}]",
    f"f32[{c.mlp},{c.embed}]",
    f"f32[{c.embed},{c.heads},{c.head_dim}]",
    f"f32[{config_lib.padded_vocab(VOCAB)},{c.embed}]",
  ]
  pattern = r"= (\S+?)[{\s]\S* (?:copy|transpose|dynamic-slice|fusion)\("

  def moved(program):
    """Shapes that an instruction of the loop over tokens writes."""
    lines = [x for x in program.splitlines() if "sample)/while/body" in x]
    assert lines
    return [m[1] for x in lines for m in [re.search(pattern, x)] if m]

  def large(program):
    return [s for s in moved(program) if s in weights or s.startswith(stacked)]

  assert not large(lowered(model, params))
  monkeypatch.setattr(sample, "_COPIED", 0)
  assert large(lowered(model, params))  # so the test can see them


def test_layers_too_large_for_copies_stay_in_their_loop(monkeypatch):
  """And draw the same."""
  want = draw()
  model, params, _ = world()
  monkeypatch.setattr(sample, "_COPIED", 0)
  got = sample.compiled(model)(
    params,
    PROMPTS,
    LENGTHS,
    IDS,
    jax.random.key(2),
    max_new_tokens=N,
    temperature=1.0,
    top_p=1.0,
    end_ids=(EOS,),
  )
  for a, b in zip(got[:3], want[:3], strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_allclose(got.logps, want.logps, rtol=0, atol=1e-5)


def test_inside_a_jit_on_a_mesh_the_samples_are_those_of_one_device():
  """As a rollout draws them; each device holds its part of the cache."""
  model, params, _ = world()
  options = {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
  mesh = mesh_lib.make(config_dict.ConfigDict(options))
  placed = run.place(params, mesh_lib.shardings(mesh, params, axes.spec))
  rows = NamedSharding(mesh, PartitionSpec(reduce.ROWS))

  @jax.jit
  def rollout(params, prompts, lengths, ids):
    samples = sample.sample(
      model,
      params,
      prompts,
      lengths,
      ids,
      jax.random.key(2),
      max_new_tokens=N,
      temperature=1.0,
      top_p=1.0,
      end_ids=(EOS,),
    )
    return samples, jnp.sum(samples.logps, axis=1)

  with jax.set_mesh(mesh):
    args = placed, *jax.device_put((PROMPTS, LENGTHS, IDS), rows)
    program = rollout.lower(*args).compile()
    got, sums = program(*args)
  want = draw()
  for a, b in zip(got[:3], want[:3], strict=True):
    np.testing.assert_array_equal(a, b)
  # Sums in another order, of f32 log-probs of order 1.
  np.testing.assert_allclose(got.logps, want.logps, atol=1e-5)
  np.testing.assert_allclose(sums, want.logps.sum(axis=1), atol=1e-5)
  # Rows, kv heads, positions, head size: rows over 4, heads over 2.
  shapes = set(re.findall(rf"f32\[\d+,\d+,{T + N},8\]", program.as_text()))
  assert shapes == {f"f32[{B // 4},1,{T + N},8]"}


def test_sampling_past_a_learned_position_table_is_refused():
  model = decoder.build(worlds.MODELS["gpt2"], VOCAB)
  params = jax.eval_shape(model.init, jax.random.key(0))
  with pytest.raises(ValueError, match=r"model.max_positions = 64"):
    sample.compiled(model).lower(
      params,
      jnp.zeros((1, 60), jnp.int32),
      jnp.int32([60]),
      jnp.int32([0]),
      jax.random.key(0),
      max_new_tokens=20,
      temperature=1.0,
      top_p=1.0,
      end_ids=(),
    )
