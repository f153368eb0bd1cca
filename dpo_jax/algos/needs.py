"""What losses need beside the sums of log-probs, computed when asked for."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.algos import base
from dpo_jax.ops import distributions, logprobs


class Scored(NamedTuple):
  """A batch whose tokens were scored by policy and reference.

  Attributes:
    batch: rows, see data.batch.rows; prepared.
    token_logps, ref_token_logps: f32[R, S] in nats; zeros without a reference.
    outputs: (hidden, Head) of the policy.
    rng: typed key of the update.
  """

  batch: dict
  token_logps: jax.Array
  ref_token_logps: jax.Array
  outputs: Any
  rng: jax.Array


def of_completions(scored, values):
  """f32[R, S] summed over the completions of each comparison: f32[R, Q, C]."""
  sums = base.completion_sums(values, scored.batch)
  return logprobs.select(sums, scored.batch["pairs"])


def of_slots(batch, name):
  """What a batch says of each completion, at the comparisons: f32[R, Q, C]."""
  values = batch[name].reshape(batch[name].shape[0], -1)
  return logprobs.select(values, batch["pairs"])


def lengths(scored):
  """Scored tokens n."""
  return logprobs.select(base.lengths(scored.batch), scored.batch["pairs"])


def sum_sq_probs(scored):
  """Σ_t log Σ_v π(v)² over a completion, without gradient."""
  outputs = jax.lax.stop_gradient(scored.outputs)
  where = scored.batch["source_index"], base.scored_mask(scored.batch)
  per_token = distributions.token_log_sum_sq(*outputs, *where)
  return of_completions(scored, per_token)


def sequence_kl(scored):
  """Σ_t KL(π_ref ‖ π) over a completion, in nats."""
  both = *scored.batch["ref_outputs"], *scored.outputs
  where = scored.batch["source_index"], base.scored_mask(scored.batch)
  return of_completions(scored, distributions.token_kl(*both, *where))


def _first(scored, values, rank):
  """Sums over the tokens of lowest rank, as many as the shortest of a pair has.

  Of `values` f32[R, S] by `rank` i32[R, S], from 0 in each completion.
  """
  pairs = scored.batch["pairs"]
  shortest = jnp.min(lengths(scored), axis=-1)
  inside = rank[:, None, None, :] < shortest[..., None, None]
  inside &= scored.batch["target_slot"][:, None, None, :] == pairs[..., None]
  kept = jnp.where(inside, values[:, None, None, :], 0.0)
  return jnp.sum(kept, axis=-1)


def _place(batch):
  """i32[R, S]: a token's place in its completion, from 0."""
  slot = batch["target_slot"]
  new = jnp.diff(slot, axis=1, prepend=-1) != 0
  index = jax.lax.broadcasted_iota(jnp.int32, slot.shape, 1)
  return index - jax.lax.cummax(jnp.where(new, index, 0), axis=1)


def _random_rank(batch, rng):
  """i32[R, S]: the place of a token in a random order of its completion.

  Drawn from `rng`, the example's id, the completion and the token's place:
  never from where the example lies in a batch.
  """
  slot, place = batch["target_slot"], _place(batch)
  count = base.completions(batch)
  example = jnp.repeat(batch["example_id"], count, axis=1)  # by slot
  known = jnp.minimum(slot, example.shape[1] - 1)
  example = jnp.take_along_axis(example, known, axis=1)

  def draw(example, completion, place):
    key = rng
    for part in (example, completion, place):
      key = jax.random.fold_in(key, part)
    return jax.random.uniform(key)

  draws = jax.vmap(jax.vmap(draw))(example, slot % count, place)
  # Sorted by completion and then by draw, a token's rank is its place there.
  index = jax.lax.broadcasted_iota(jnp.int32, slot.shape, 1)
  _, _, order = jax.lax.sort((slot, draws, index), dimension=1, num_keys=2)
  # Each completion takes the same stretch as before, since slots come in order.
  return jax.vmap(lambda o, p: jnp.zeros_like(p).at[o].set(p))(order, place)


# By the name of the argument; f32[R, Q, C] but for those of a comparison.
NEEDS = {
  "lengths": lengths,
  "scores": lambda s: of_slots(s.batch, "scores"),  # of the data, s_w and s_l
  "prefix_logps": lambda s: _first(s, s.token_logps, _place(s.batch)),
  "ref_prefix_logps": lambda s: _first(s, s.ref_token_logps, _place(s.batch)),
  "common_logps": lambda s: _first(
    s, s.token_logps, _random_rank(s.batch, s.rng)
  ),
  "ref_common_logps": lambda s: _first(
    s, s.ref_token_logps, _random_rank(s.batch, s.rng)
  ),
  "sum_sq_probs": sum_sq_probs,
  "sequence_kl": sequence_kl,
  "present": lambda s: s.batch["pairs"] < base.slots(s.batch),
  "labels": lambda s: s.batch["labels"],
  "weights": lambda s: s.batch["weights"],
}
# Those through which a loss is differentiated.
MOVING = ("policy_logps", "prefix_logps", "common_logps", "sequence_kl")
# What a coupled loss keeps between steps: see `preference.combine`.
KEPT = ("running",)
