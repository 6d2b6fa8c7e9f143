"""Numbers computed by hand, at least one for everything that has a name.

`conformance_test.py` checks them and fails for a name without one, so this is
the only test file that a new divergence, loss, advantage, normaliser or
algorithm must touch. Probabilities go in, as a table of the whole vocabulary or
of the sampled token alone (the rest is then one other token).
"""

import math

import jax.numpy as jnp
import numpy as np

from dppo_jax import divergences


def two_token_logits(probabilities):
  """[...] probabilities of token 0 -> [..., 2] logits, the rest on token 1."""
  p = np.asarray(probabilities, np.float64)
  with np.errstate(divide='ignore'):  # p = 0 and p = 1 are asked for.
    return jnp.asarray(np.stack([np.log(p), np.log1p(-p)], -1), jnp.float32)


def logs(probabilities):
  """float32 logarithms, taken in float64."""
  return jnp.asarray(np.log(np.asarray(probabilities, np.float64)), jnp.float32)


def distance(divergence, *, behaviour, target, tokens):
  """Records with behaviour logits, measures with target logits. -> [...]."""
  recorded = divergence.record(behaviour, tokens)
  return divergence.measure(target, tokens, recorded)


def sampled_distance(name, *, behaviour, target, **options):
  """As `distance`, from probabilities of the sampled token. [...] -> [...]."""
  behaviour, target = np.broadcast_arrays(behaviour, target)
  return distance(
      divergences.build(name, **options),
      behaviour=two_token_logits(behaviour),
      target=two_token_logits(target),
      tokens=jnp.zeros(np.shape(behaviour), jnp.int32),
  )


# Six tokens; |mu - pi| = .10 .05 .03 .02 .10 .00, so the full TV is .30 / 2.
MU = (0.40, 0.25, 0.15, 0.10, 0.06, 0.04)
PI = (0.30, 0.20, 0.18, 0.12, 0.16, 0.04)

# name: [(behaviour, target, sampled token, options, value), ...]
DIVERGENCES = {
    'none': [(MU, PI, 4, {}, 0.0)],
    # .16 / .06 - 1; and downwards: .30 / .40 - 1 = -.25.
    'ratio_gap': [(MU, PI, 4, {}, 5 / 3), (MU, PI, 0, {}, 0.25)],
    # |.06 - .16|.
    'binary_tv': [(MU, PI, 4, {}, 0.10)],
    # .06 ln(.06/.16) + .94 ln(.94/.84) = -.058850 + .105730.
    'binary_kl': [(MU, PI, 4, {}, 0.046880)],
    # {0} {1} {4} {rest}: (.10 + .05 + .10 + |.29 - .34|) / 2; replaced:
    # {0} {4} {rest}: (.10 + .10 + |.54 - .54|) / 2.
    'topk_tv': [
        (MU, PI, 4, {'k': 2}, 0.15),
        (MU, PI, 4, {'k': 2, 'construction': 'replace'}, 0.10),
    ],
    # .40 ln(4/3) + .25 ln(1.25) + .06 ln(.375) + .29 ln(.29/.34)
    # = .115073 + .055786 - .058850 - .046129; replaced: the first, the third
    # and .54 ln(.54/.54) = 0.
    'topk_kl': [
        (MU, PI, 4, {'k': 2}, 0.065880),
        (MU, PI, 4, {'k': 2, 'construction': 'replace'}, 0.056223),
    ],
    'full_tv': [(MU, PI, 4, {}, 0.15)],
    # .115073 + .055786 + .15 ln(15/18) + .10 ln(10/12) - .058850 + 0
    # = .112009 - .027348 - .018232.
    'full_kl': [(MU, PI, 4, {}, 0.066429)],
}

# name: [(options, behaviour, target, advantage, loss, gradient by logprob)]
LOSSES = {
    'policy_gradient': [
        # ratio 1.5: -1.5 ln(.75) and -1.5.
        ({}, 0.5, 0.75, 1.0, 0.431523, -1.5),
        # ratio .5, advantage -2: +1 ln(.25) and +1.
        ({}, 0.5, 0.25, -2.0, -1.386294, 1.0),
        # ratio 5, capped at 3: -3 ln(.5) and -3.
        ({'ratio_cap': 3.0}, 0.1, 0.5, 1.0, 2.079442, -3.0),
    ],
}

# name: [(options, rewards, advantages)]
ADVANTAGES = {
    # means .25 and 1.
    'group_mean': [(
        {'group_size': 4},
        (1, 0, 0, 0, 1, 1, 1, 1),
        (0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0),
    )],
    # mean .5, unbiased deviation sqrt(2 * .25 / 1) = .707107.
    'group_zscore': [
        ({'group_size': 2}, (1, 0, 1, 1), (0.707106, -0.707106, 0, 0))
    ],
    # 1 - 0; 0 - 1/3.
    'leave_one_out': [
        ({'group_size': 4}, (1, 0, 0, 0), (1, -1 / 3, -1 / 3, -1 / 3))
    ],
}

# name: [(options, token mask, weights)]
_MASK = ((1, 1, 1), (1, 0, 0))
NORMALIZERS = {
    # 1 / (2 sequences * 4 tokens).
    'constant': [({'horizon': 4}, _MASK, ((1 / 8,) * 3, (1 / 8, 0, 0)))],
    # 1 / 4 tokens.
    'token_mean': [({}, _MASK, ((1 / 4,) * 3, (1 / 4, 0, 0)))],
    # 1 / (2 sequences * 3 tokens) and 1 / (2 sequences * 1 token).
    'sequence_mean': [({}, _MASK, ((1 / 6,) * 3, (1 / 2, 0, 0)))],
}

# Ten tokens and what each row of the table of algorithms does with them. The
# rest of mu and of pi is spread evenly, so every divergence but `none` and
# `ratio_gap` is the binary one.
#
#   mu    pi    A   ratio  TV     KL      gap    moves
#   .5    .75   +   1.5    .25    .1438   .5     out
#   .5    .75   -   1.5    .25    .1438   .5     back
#   .5    .25   +   .5     .25    .1438   .5     back
#   .5    .25   -   .5     .25    .1438   .5     out
#   .5    .55   +   1.1    .05    .0050   .1     out
#   .05   .5    -   10     .45    .4946   9      back, ratio above every cap
#   .4    .5    +   1.25   .10    .0201   .25    out
#   .99   .80   -   .8081  .19    .1810   .1919  out
#   .0001 .01   +   100    .0099  .0095   99     out, ratio above every cap
#   .5    .667  +   1.333  .1667  .0589   .3333  out
BEHAVIOUR = (0.5, 0.5, 0.5, 0.5, 0.5, 0.05, 0.4, 0.99, 1e-4, 0.5)
TARGET = (0.75, 0.75, 0.25, 0.25, 0.55, 0.5, 0.5, 0.8, 1e-2, 2 / 3)
SIGNS = (1, -1, 1, -1, 1, -1, 1, -1, 1, 1)

# name: gradient of each token's loss by its logprob, -min(ratio, C) A or 0.
_R = 0.80 / 0.99
_TOPK_TV = (0, 1.5, -0.5, 0, -1.1, 5, -1.25, _R, -5, -4 / 3)  # .2, C 5
_TOPK_KL = (0, 1.5, -0.5, 0, -1.1, 5, -1.25, 0, -5, 0)  # .05, C 5
ALGORITHMS = {
    'dppo_topk_tv': _TOPK_TV,
    'dppo_topk_kl': _TOPK_KL,
    'dppo_full_tv': _TOPK_TV,
    'dppo_full_kl': _TOPK_KL,
    # .15, no cap: .19 and .1667 are outside.
    'dppo_binary_tv': (0, 1.5, -0.5, 0, -1.1, 10, -1.25, 0, -100, 0),
    # .05, no cap.
    'dppo_binary_kl': (0, 1.5, -0.5, 0, -1.1, 10, -1.25, 0, -100, 0),
    # 1.25 is outside [.8, 1.2], .8081 is not.
    'grpo': (0, 1.5, -0.5, 0, -1.1, 10, 0, _R, 0, 0),
    # 1.25 is inside [.8, 1.28], 1.333 is not.
    'grpo_clip_higher': (0, 1.5, -0.5, 0, -1.1, 10, -1.25, _R, 0, 0),
    # Every token pushes; C 3.
    'cispo': (-1.5, 1.5, -0.5, 0.5, -1.1, 3, -1.25, _R, -3, -4 / 3),
    'pg_is': (-1.5, 1.5, -0.5, 0.5, -1.1, 10, -1.25, _R, -100, -4 / 3),
}

# name: (threshold or (low, high), ratio cap), as the papers have them.
PAPER_SETTINGS = {
    'dppo_topk_tv': (0.2, 5.0),  # arXiv:2602.04879 App. F.3.
    'dppo_topk_kl': (0.05, 5.0),  # App. F.3.
    'dppo_full_tv': (0.2, 5.0),  # As the top-K it stands for.
    'dppo_full_kl': (0.05, 5.0),
    'dppo_binary_tv': (0.15, math.inf),  # App. C.1.
    'dppo_binary_kl': (0.05, math.inf),  # App. C.1.
    'grpo': (0.2, math.inf),  # arXiv:2402.03300.
    'grpo_clip_higher': ((0.2, 0.28), math.inf),  # App. C.1.
    'cispo': (math.inf, 3.0),  # App. C.1.
    'pg_is': (math.inf, math.inf),  # App. C.1.
}
