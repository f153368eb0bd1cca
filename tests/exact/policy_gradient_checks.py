"""What must hold of policy gradients in the language that can be listed.

Ordinary tests call these on the code as it is, and expect silence; the tests of
planted bugs call them on broken code, and expect an AssertionError.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import tree
from dpo_jax.eval import rollouts
from dpo_jax.models import sample
from dpo_jax.ops import logprobs, reduce
from dpo_jax.ops.rl import advantages
from tests.exact import policy_gradients as world

# f32 sums of a few hundred products, relative to the gradient: 5e-7 seen, of
# gradients of norm 1 to 2.
CLOSE = 2e-6
HOT = 0.7  # a temperature beside 1


def _is_exact(c, of, temperature=None, **options):
  got = world.policy_gradient_of(c, of, **options)
  assert world.distance(got, world.exact_gradient(temperature)) < CLOSE


def reinforce():
  """The gradient of the loss is −∇(E[r] − β KL)."""
  _is_exact(world.config("reinforce"), world.groups(None))


def rloo():
  """The same, over all pairs of answers."""
  _is_exact(world.config("rloo"), world.groups(2))


def grpo():
  """Without a scale (1 − 1/K) of it: an answer is its own baseline too."""
  got = world.policy_gradient_of(world.config("grpo"), world.groups(2))
  half = jax.tree.map(lambda x: 0.5 * x, world.exact_gradient())
  assert world.distance(got, half) < CLOSE


def ppo():
  """With exact values it is exact for λ below 1 too."""
  c = world.config("ppo", lam=HOT)
  _is_exact(c, world.groups(None), exact=True)


def ppo_of_any_critic():
  """With λ = 1 a critic is a baseline, right or wrong."""
  _is_exact(world.config("ppo", lam=1.0), world.groups(None))


def hot_reinforce():
  """At another temperature that is the policy, in every log-prob."""
  c = world.config("reinforce", temperature=HOT)
  _is_exact(c, world.groups(None), HOT)


def ppo_policy_loss_leaves_the_critic_alone():
  """Advantages are constants: nothing of them is differentiated."""
  c = world.config("ppo")
  gradient = world.loss_gradient(c, world.groups(None), term="policy")
  for name in ("critic", "value"):
    assert float(tree.norm(gradient[name])) == 0
  assert float(tree.norm(gradient["model"])) > 0.1


def ppo_critic_does_not_know_the_token_that_it_judges():
  """V_t is the same for all answers that begin alike, before token t."""
  algorithm = world.algorithm_of(world.config("ppo"))
  of, params = world.groups(None), world.initial(algorithm)
  extra = algorithm.extra(params)

  @jax.jit
  def values(params):
    trees = params, {"ref": world.model()[1]}, extra
    hparams = world.numbers(world.config("ppo"))
    tokens = rollouts.measured(algorithm, hparams, *trees, of.batch)
    return world.padded(tokens["values"], of)

  found = np.asarray(values(params))  # [X, Y, N]
  for y, t in zip(*np.nonzero(world.MASK), strict=True):
    alike = found[:, world.ALIKE[y, t], t]
    # The same sums: the same state, in another branch of the row.
    assert np.ptp(alike, axis=1).max() < 1e-5
  # And it says something: states differ.
  assert np.ptp(found[:, world.MASK]) > 0.1


def rewards_lie_on_tokens():
  """Their sum is score − β Σ k1; the score is at the last token, not behind."""
  rng = np.random.default_rng(0)
  lengths = np.asarray([[1, 3, 5], [4, 5, 2]])
  mask = np.arange(5) < lengths[..., None]
  logps, ref = rng.normal(size=(2, *mask.shape)).astype(np.float32)
  scores = rng.normal(size=lengths.shape).astype(np.float32)
  out = np.asarray(
    advantages.token_rewards(scores, logps, ref, mask, beta=world.BETA)
  )
  k1 = np.where(mask, logps - ref, 0)
  assert not out[~mask].any()
  want = scores - world.BETA * k1.sum(-1)
  assert np.abs(out.sum(-1) - want).max() < 1e-5
  before = out + world.BETA * k1
  before[np.arange(5) == lengths[..., None] - 1] = 0
  assert np.abs(before).max() < 1e-6


def hot_samples(count=64):
  """(prompt i32[B], Samples) of the real sampler, at HOT."""
  built, _ = world.model()
  prompt = np.repeat(np.arange(len(world.PROMPTS)), count)
  longest = max(map(len, world.PROMPTS))
  tokens = np.zeros((len(prompt), longest), np.int32)
  for row, x in zip(tokens, prompt, strict=True):
    row[: len(world.PROMPTS[x])] = world.PROMPTS[x]
  lengths = np.asarray([len(world.PROMPTS[x]) for x in prompt], np.int32)
  samples = sample.compiled(built)(
    *(world.policy(), tokens, lengths, np.arange(len(prompt), dtype=np.int32)),
    jax.random.key(0),
    max_new_tokens=world.LONGEST,
    temperature=HOT,
    top_p=1.0,
    end_ids=(world.END,),
    vocab_size=world.END + 1,
  )
  return prompt, jax.device_get(samples)


def hot_samples_are_the_policy_s():
  """The log-probs of the sampler are those of the training pass."""
  prompt, samples = hot_samples()
  algorithm = world.algorithm_of(world.config("reinforce", temperature=HOT))
  of = world.groups(None)

  @jax.jit
  def measured(params):
    trees = params, {"ref": params}, algorithm.extra(params)
    tokens = rollouts.measured(algorithm, {}, *trees, of.batch)
    return world.padded(tokens["old_logps"], of)

  logps = np.asarray(measured(world.policy()))
  for x, ids, n, got in zip(
    prompt, samples.tokens, samples.lengths, samples.logps, strict=True
  ):
    want = logps[x, world.ANSWERS.index(ids[:n].tolist()), :n]
    # f32 log-probs, with a cache and without one.
    assert np.abs(got[:n] - want).max() < 1e-5


def policy_gradient_on_samples(name, draws, groups=400):
  """Largest |mean − exact| / SE over directions, of groups that are drawn.

  The answers are drawn from the exact probabilities. A direction each: that of
  the exact gradient, and random ones.
  """
  of, exact = sampled(draws, groups), world.exact_gradient()
  gradients = row_gradients(world.config(name), of)
  if name == "grpo":
    exact = jax.tree.map(lambda x: (1 - 1 / draws) * x, exact)
  rng, errors = np.random.default_rng(5), []
  for number in range(8):
    direction = exact
    if number:
      direction = jax.tree.map(lambda x: rng.normal(size=x.shape), exact)
    each = along(gradients, direction)
    # Both prompts have as many groups, so that their mean is that of all.
    error = each.mean() - along(
      jax.tree.map(lambda x: x[None], exact), direction
    )
    errors.append(abs(error.item()) / (each.std(ddof=1) / len(each) ** 0.5))
  return max(errors)


def row_gradients(c, of):
  """∇ of the mean loss of each row, alone: trees of [R, …]."""
  algorithm, hparams = world.algorithm_of(c), world.numbers(c)
  ref, params = world.model()[1], world.policy()

  @jax.jit
  def compute(params):
    extra = algorithm.extra(params)
    batch = world.learned_from(algorithm, hparams, params, ref, extra, of)
    there = batch["completion_weights"] > 0
    batch["completion_weights"] = there.astype(jnp.float32)

    def loss(params, row):
      row = jax.tree.map(lambda x: x[None], row)
      row = algorithm.prepare(row, {"ref": ref}, extra)
      terms = algorithm.objective(params, {}, row, hparams, extra)
      return reduce.means(terms.losses)["policy"]

    return jax.vmap(jax.grad(loss), (None, 0))(params, batch)

  return compute(params)


def along(gradients, direction):
  """f64[R]: the scalar products of trees of [R, …] with one."""
  parts = jax.tree.map(
    lambda g, d: np.tensordot(
      np.asarray(g, float), np.asarray(d, float), d.ndim
    ),
    *(gradients, direction),
  )
  return sum(jax.tree.leaves(parts))


def entropies(hidden, head, of):
  """f32[R, S] of the distributions that the scored tokens are drawn from."""
  at = jnp.take_along_axis(hidden, of.batch["source_index"][..., None], axis=1)
  logps = jax.nn.log_softmax(logprobs.logits(at, head))
  return -jnp.sum(jnp.exp(logps) * logps, axis=-1)


def sampled(draws, groups):
  """Groups of answers, each drawn from the policy."""
  logps = np.exp(np.asarray(jax.jit(world.log_policy)(world.policy()), float))
  rng = np.random.default_rng(4)
  prompt = np.repeat(np.arange(len(world.PROMPTS)), groups // 2)
  members = np.stack(
    [
      rng.choice(len(world.ANSWERS), draws, p=logps[x] / logps[x].sum())
      for x in prompt
    ]
  )
  return world.of_members(prompt, members)


def entropy_bonus_is_the_entropy_s_gradient():
  """−w ∇ of the mean entropy of a token, over the states as they are."""
  weight = 0.3
  everything = world.groups(None)
  c = world.config("reinforce", entropy_weight=weight)
  got = world.policy_gradient_of(c, everything, term="entropy")

  def entropy(params, logps):
    hidden, head = world.model()[0].apply(params, everything.batch)
    each = world.padded(entropies(hidden, head, everything), everything)
    share = jnp.exp(logps)[..., None] * world.MASK
    return weight * jnp.sum(share * each) / jnp.sum(share)

  params = world.policy()
  want = jax.jit(jax.grad(entropy))(params, world.log_policy(params))
  want = jax.tree.map(jnp.negative, want)
  assert world.distance(got, want) < CLOSE


CHECKS = (
  *(reinforce, rloo, grpo, ppo, ppo_of_any_critic, hot_reinforce),
  ppo_policy_loss_leaves_the_critic_alone,
  ppo_critic_does_not_know_the_token_that_it_judges,
  *(rewards_lie_on_tokens, hot_samples_are_the_policy_s),
  entropy_bonus_is_the_entropy_s_gradient,
)
