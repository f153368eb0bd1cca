"""What every loss shares: log-ratios, margins, metrics."""

import jax
import jax.numpy as jnp


def log_ratios(policy_logps, ref_logps):
  """Δ f32[..., C] in nats; the reference is a constant."""
  return policy_logps - jax.lax.stop_gradient(ref_logps)


def margins(scores):
  """scores[..., 0] − scores[..., 1]: chosen less rejected."""
  return scores[..., 0] - scores[..., 1]


def means(logps, lengths):
  """Log-probs per token; 0 where there is none."""
  return logps / jnp.maximum(lengths, 1.0)


def with_metrics(loss, policy_logps, rewards):
  """The output of a pairwise loss: adds its metrics, without gradient."""
  policy_logps, rewards = jax.lax.stop_gradient((policy_logps, rewards))
  chosen, rejected = rewards[..., 0], rewards[..., 1]
  # A tie counts one half: at policy = reference the accuracy is 0.5, not 0.
  accuracy = 0.5 * (1.0 + jnp.sign(chosen - rejected))
  return {
    "loss": loss,
    "rewards/chosen": chosen,
    "rewards/rejected": rejected,
    "rewards/margins": chosen - rejected,
    "rewards/accuracies": accuracy,
    "logps/chosen": policy_logps[..., 0],
    "logps/rejected": policy_logps[..., 1],
  }


@jax.custom_jvp
def log_sigmoid(x):
  """log σ(x), whose slope is σ(−x) at any size of x.

  That of jax.nn.log_sigmoid is e to the difference of two numbers, which a
  compiler may round apart: it is off by e^½ at margins of 4·10⁶.
  """
  return jax.nn.log_sigmoid(x)


log_sigmoid.defjvps(lambda t, _, x: t * jax.nn.sigmoid(-x))


def smooth_exp(x, top):
  """e^x up to x = top and its tangent beyond: finite, and never flat."""
  below = jnp.exp(jnp.minimum(x, top))
  return below * (1.0 + jnp.maximum(x - top, 0.0))
