"""Attention: the rule, its implementations, and the choice among them."""

from dpo_jax.ops.attention import blockwise, choice, cudnn, rule, splash, tiled

Layout = rule.Layout
visible = rule.visible
capped = rule.capped
take_rows = rule.take_rows
cached = rule.cached
KEPT = rule.KEPT

# Each is fn(q, k, v, layout, *, window, scale, softcap), see rule.xla.
ATTENTION = {
  "auto": choice.auto,
  "tiled": tiled.tiled,
  "xla": rule.xla,
  "blockwise": blockwise.blockwise,
  "cudnn": cudnn.cudnn,
  "splash": splash.splash,
}
