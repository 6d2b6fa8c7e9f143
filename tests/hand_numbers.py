"""Numbers computed by hand, at least one for everything that has a name.

`conformance_test.py` checks them and fails for a name without one, so this is
the only test file that a new divergence, loss, advantage, normaliser or dual
must touch; a row of algorithms also has its closed form in algorithms_test.py.
Probabilities go in, as a table of the whole vocabulary or of the sampled token
alone (the rest is then one other token).
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
    # That of topk_kl; only its direction is another.
    'predictive_kl': [
        (MU, PI, 4, {'k': 2}, 0.065880),
        (MU, PI, 4, {'k': 2, 'construction': 'replace'}, 0.056223),
    ],
    'full_tv': [(MU, PI, 4, {}, 0.15)],
    # .115073 + .055786 + .15 ln(15/18) + .10 ln(10/12) - .058850 + 0
    # = .112009 - .027348 - .018232.
    'full_kl': [(MU, PI, 4, {}, 0.066429)],
}

# One sequence; D = |mu - pi|, moving out where A and log r have the same sign.
# name: [(options, threshold, behaviour, target, advantages, what is kept)]
_HALVES = (0.5,) * 3
_E = math.exp
REGIONS = {
    # D .2 .2 .2 .2; moving out, back, back, out.
    'outward': [(
        {}, 0.15, (0.5,) * 4, (0.7, 0.7, 0.3, 0.3), (1, -1, 1, -1),
        (0, 1, 1, 0),
    )],
    # D .3 .3 .3 .1, and .25 at the threshold: only a falling token with A < 0
    # and D >= .25 goes.
    'minimal': [
        (
            {}, 0.25, (0.5, 0.5, 0.5, 0.9, 0.5), (0.2, 0.8, 0.2, 0.8, 0.25),
            (-1, -1, 1, -1, -1), (0, 1, 1, 1, 0),
        ),
        # Of two thresholds that for A < 0: D .3 and .1.
        ({}, (0.25, 0.05), (0.5, 0.5), (0.2, 0.4), (-1, -1), (0, 1)),
    ],
    # D .15 .08 .2 .2, all moving out; mu < .1 in the first two.
    'relaxed': [
        (
            options, 0.05, (0.05, 0.09, 0.5, 0.5), (0.2, 0.01, 0.7, 0.3),
            (1, -1, 1, -1), kept,
        )
        for options, kept in (
            ({}, (1, 1, 0, 0)),
            ({'side': 'high'}, (1, 0, 0, 0)),
            ({'side': 'low'}, (0, 1, 0, 0)),
            ({'alpha': 0.06}, (1, 0, 0, 0)),
        )
    ],
    # r 4 and 2 coming back, 1.4 out, .8 back.
    'dual_clip': [(
        {}, 0.15, (0.1, 0.1, 0.5, 0.5), (0.4, 0.2, 0.7, 0.4), (-1, -1, 1, 1),
        (0, 1, 0, 1),
    )],
    # r .4, 6, .6, 4.
    'band': [(
        {}, 0.15, (0.5, 0.1, 0.5, 0.1), (0.2, 0.6, 0.3, 0.4), (1, -1, -1, 1),
        (0, 0, 1, 1),
    )],
    # r 1.5 1.5 1.2: (2.7)^(1/3) - 1 = .392.
    'sequence_ratio': [
        ({}, limit, (0.4, 0.4, 0.5), (0.6,) * 3, (sign,) * 3, (kept,) * 3)
        for limit, sign, kept in ((0.39, 1, 0), (0.40, 1, 1), (0.39, -1, 1))
    ],
    # D .2 .2 .1: largest .2, mean .1667, whatever the advantage.
    'sequence_divergence': [
        (
            {'statistic': statistic}, limit, _HALVES, (0.7, 0.3, 0.6),
            (sign,) * 3, (kept,) * 3,
        )
        for statistic, limit, sign, kept in (
            ('max', 0.21, 1, 1),
            ('max', 0.19, 1, 0),
            ('max', 0.19, -1, 0),
            ('mean', 0.17, 1, 1),
            ('mean', 0.16, -1, 0),
        )
    ],
    # w 1 .9 .8, D .1: w D .1 .09 .08, S .1 .19 .27 against d + budget * W =
    # .15, .165, .1785; soft: 1, .165 / .19, .1785 / .27. In the last case the
    # second token comes back; it counts in S all the same.
    'cumulative_prefix': [
        ({}, 0.15, _HALVES, (0.6,) * 3, (1, 1, 1), (1, 0, 0)),
        (
            {'soft': True}, 0.15, _HALVES, (0.6,) * 3, (1, 1, 1),
            (1, 0.868421, 0.661111),
        ),
        ({}, 0.15, _HALVES, (0.6, 0.4, 0.6), (1, 1, 1), (1, 1, 0)),
        # The limit of a single token: w D = .1 > .09.
        ({}, 0.09, _HALVES, (0.6, 0.5, 0.5), (1, 1, 1), (0, 1, 1)),
        # d + budget W = .15, .35, .53: nothing goes.
        ({'budget': 0.2}, 0.15, _HALVES, (0.6,) * 3, (1, 1, 1), (1, 1, 1)),
    ],
    'second_moment': [
        # log r .3 .2 .1: squares .09 .04 .01, mean .0467; without the first
        # .025.
        (
            {}, 1.0, (0.3,) * 3, [0.3 * _E(x) for x in (0.3, 0.2, 0.1)],
            (1, 1, 1), (0, 1, 1),
        ),
        # -.32 comes back and stays: (.1024 + 3 * .01) / 4 = .0331.
        (
            {}, 1.0, (0.3,) * 4, [0.3 * _E(x) for x in (-0.32, 0.1, 0.1, 0.1)],
            (1, 1, 1, 1), (1, 1, 1, 1),
        ),
        # .1024 .09 .01 .01: mean .0531; without .09 .0408, without any other
        # more.
        (
            {'limit': 0.041}, 1.0, (0.3,) * 4,
            [0.3 * _E(x) for x in (-0.32, 0.3, 0.1, 0.1)], (1, 1, 1, 1),
            (1, 0, 1, 1),
        ),
        (
            {'limit': 0.040}, 1.0, (0.3,) * 4,
            [0.3 * _E(x) for x in (-0.32, 0.3, 0.1, 0.1)], (1, 1, 1, 1),
            (1, 0, 0, 0),
        ),
    ],
}

# What a constrained loss is told: lambda, and the limit of its constraint.
MULTIPLIER, LIMIT = 0.04, 0.02

# One sequence: name: [(options, behaviour, target, advantage, summed loss,
# gradient by logprob)]
LOSSES = {
    'policy_gradient': [
        # ratio 1.5: -1.5 ln(.75) and -1.5.
        ({}, 0.5, 0.75, 1.0, 0.431523, -1.5),
        # ratio .5, advantage -2: +1 ln(.25) and +1.
        ({}, 0.5, 0.25, -2.0, -1.386294, 1.0),
        # ratio 5, capped at 3: -3 ln(.5) and -3.
        ({'ratio_cap': 3.0}, 0.1, 0.5, 1.0, 2.079442, -3.0),
        # ratios 1.5 and 1.2: product 1.8, geometric mean sqrt(1.8) = 1.341641;
        # times -2 ln(.6) = 1.021651.
        (
            {'ratio': 'sequence'}, (0.4, 0.5), (0.6, 0.6), 1.0, 1.838972,
            (-1.8, -1.8),
        ),
        (
            {'ratio': 'geometric'}, (0.4, 0.5), (0.6, 0.6), 1.0, 1.370689,
            (-1.341641, -1.341641),
        ),
        (
            {'ratio': 'sequence', 'ratio_cap': 1.5}, (0.4, 0.5), (0.6, 0.6),
            1.0, 1.532477, (-1.5, -1.5),
        ),
    ],
    # r (A - |A| (r - 1) / 12.5).
    'spo': [
        # 1.5 (1 - .04) = 1.44; times ln(.75).
        ({}, 0.5, 0.75, 1.0, 0.414262, -1.44),
        # 2 (-1 - .08) = -2.16; times ln(.8).
        ({}, 0.4, 0.8, -1.0, -0.481990, 2.16),
        # 13.5 (1 - 1): where it turns.
        ({}, 0.02, 0.27, 1.0, 0.0, 0.0),
        # 30 (1 - 29 / 12.5) = -39.6; times ln(.3).
        ({}, 0.01, 0.3, 1.0, -47.677323, 39.6),
    ],
    # r A (1 - sign(A) (pi - mu) / 12.5).
    'drpo': [
        # 1.5 (1 - .02) = 1.47.
        ({}, 0.5, 0.75, 1.0, 0.422892, -1.47),
        # 2 (-1) (1 + .032) = -2.064.
        ({}, 0.4, 0.8, -1.0, -0.460568, 2.064),
        # pi - mu = delta: where it turns, whatever the ratio.
        ({'delta': 0.25}, 0.5, 0.75, 1.0, 0.0, 0.0),
        ({'delta': 0.25}, 0.02, 0.27, 1.0, 0.0, 0.0),
    ],
    # r (A - .08 (r - 1)) with lambda .04.
    'r2vpo': [
        # 1.5 (1 - .04) = 1.44; times ln(.75).
        ({}, 0.5, 0.75, 1.0, 0.414262, -1.44),
        # Not times |A|: 1.5 (2 - .04) = 2.94.
        ({}, 0.5, 0.75, 2.0, 0.845785, -2.94),
        # .5 (-1 + .04) = -.48; times ln(.25).
        ({}, 0.5, 0.25, -1.0, -0.665421, 0.48),
        # 2 (-1 - .08) = -2.16; times ln(.8).
        ({}, 0.4, 0.8, -1.0, -0.481990, 2.16),
        # r = 1 + 1 / (2 lambda) = 13.5: where it turns.
        ({}, 0.02, 0.27, 1.0, 0.0, 0.0),
        # 30 (1 - .08 * 29) = -39.6; times ln(.3).
        ({}, 0.01, 0.3, 1.0, -47.677323, 39.6),
        ({'stop_at_turning_point': True}, 0.01, 0.3, 1.0, 0.0, 0.0),
        # Without advantage: 1.5 (0 - .04) = -.06 and .5 (0 + .04) = .02.
        ({}, 0.5, 0.75, 0.0, -0.017261, 0.06),
        ({}, 0.5, 0.25, 0.0, 0.027726, -0.02),
        # Around the mean 1.35 of r 1.5 1.2: 1.5 (1 - .012), 1.2 (1 + .012).
        (
            {'center': 'mean'}, (0.4, 0.5), (0.6, 0.6), 1.0, 1.377393,
            (-1.482, -1.2144),
        ),
        # Product 1.8: 1.8 (1 - .064); geometric mean: 1.341641 (1 - .027331).
        (
            {'ratio': 'sequence'}, (0.4, 0.5), (0.6, 0.6), 1.0, 1.721278,
            (-1.6848, -1.6848),
        ),
        (
            {'ratio': 'geometric'}, (0.4, 0.5), (0.6, 0.6), 1.0, 1.333227,
            (-1.304972, -1.304972),
        ),
        # Its own mean (.25 + .04) / 2 is above .02: 1.44 and 1.2 (1 - .016).
        (
            {'per': 'sequence'}, (0.4, 0.5), (0.6, 0.6), 1.0, 1.338772,
            (-1.44, -1.1808),
        ),
        # (r - 1)^2 = .01 is not, but counts in the batch: 1.1 (1 - .008).
        ({'per': 'sequence'}, 0.5, 0.55, 1.0, 0.657621, -1.1),
        ({}, 0.5, 0.55, 1.0, 0.652360, -1.0912),
    ],
}

# name: [(options, violations, the multiplier after each)]; the step goes by
# violation / .02, cut at 1.
DUALS = {
    'none': [({}, (), ())],
    'fixed': [({'multiplier': 0.3}, (0.5, -0.5), (0.3, 0.3))],
    # .04 + .02 (.5 - .25 + 1 - 1 - 1 - 1 - 1), not below 0.
    'projected_ascent': [
        (
            {}, (0.01, -0.005, 5, -0.02, -0.02, -0.02, -0.02),
            (0.05, 0.045, 0.065, 0.045, 0.025, 0.005, 0),
        ),
        # .05 / .1 = .5.
        ({'limit': 0.1, 'learning_rate': 0.2}, (0.05,), (0.14,)),
        ({'initial': 9.99}, (0.02,), (10,)),
    ],
    # .04 e^.05, times e^.1.
    'exponentiated': [
        ({}, (0.01, 5), (0.042051, 0.046473)),
        ({'initial': 2e-4, 'learning_rate': 1.0}, (-0.02,), (1e-4,)),
        ({'initial': 9.0, 'learning_rate': 1.0}, (0.02,), (10,)),
    ],
    # Sum .05 .04 .06 .04, beside it .1 times .5 -.5 1 -1, not below 0.
    'proportional_integral': [
        ({}, (0.01, -0.01, 5, -0.02), (0.10, 0, 0.16, 0)),
        # The sum is clamped too: 10, then 9.98 - .1.
        ({'initial': 9.99}, (0.02, -0.02), (10, 9.88)),
        # Nor does it fall below 0, however long there was slack: .02 + .1.
        ({}, (-0.02,) * 5 + (0.02,), (0,) * 5 + (0.12,)),
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
    # centred .5 -.5 0 0; their deviation sqrt(.5 / 4) = .353553.
    'batch_zscore': [
        ({'group_size': 2}, (1, 0, 1, 1), (1.414210, -1.414210, 0, 0))
    ],
    'raw': [({}, (1, 0, -0.5), (1, 0, -0.5))],
}

# name: [(options, rewards, lengths, shaped rewards)]
SHAPINGS = {
    'unshaped': [({}, (1, 0, 0.5), (6, 10, 0), (1, 0, 0.5))],
    # From 6 to 10 tokens: 0, 1/4, 2/4, 4/4 of the penalty.
    'overlong': [
        (
            {'horizon': 10, 'buffer': 4}, (1, 1, 1, 0, 1), (6, 7, 8, 10, 0),
            (1, 0.75, 0.5, -1, 1),
        ),
        (
            {'horizon': 10, 'buffer': 10, 'penalty': 0.5}, (1, 1), (5, 10),
            (0.75, 0.5),
        ),
    ],
}

# name: [(reference, target, kl(target || reference) of one sample)]
ESTIMATORS = {
    # x = ln(.6 / .4) = .405465, and its negative.
    'k1': [(0.4, 0.6, 0.405465), (0.6, 0.4, -0.405465)],
    # x^2 / 2.
    'k2': [(0.4, 0.6, 0.082201), (0.6, 0.4, 0.082201)],
    # .4 / .6 - 1 + x; .6 / .4 - 1 - .405465.
    'k3': [(0.4, 0.6, 0.072132), (0.6, 0.4, 0.094535)],
}

# name: [(options, token mask, weights)]
_MASK = ((1, 1, 1), (1, 0, 0))
# As `_MASK`, with a sequence of which nothing counts: it is in no denominator.
_GAP = (_MASK[0], (0, 0, 0), _MASK[1])
_NOTHING = (0, 0, 0)
NORMALIZERS = {
    # 1 / (2 sequences * 4 tokens).
    'constant': [
        ({'horizon': 4}, _MASK, ((1 / 8,) * 3, (1 / 8, 0, 0))),
        ({'horizon': 4}, _GAP, ((1 / 8,) * 3, _NOTHING, (1 / 8, 0, 0))),
    ],
    # 1 / 4 tokens.
    'token_mean': [
        ({}, _MASK, ((1 / 4,) * 3, (1 / 4, 0, 0))),
        ({}, _GAP, ((1 / 4,) * 3, _NOTHING, (1 / 4, 0, 0))),
    ],
    # 1 / (2 sequences * 3 tokens) and 1 / (2 sequences * 1 token).
    'sequence_mean': [
        ({}, _MASK, ((1 / 6,) * 3, (1 / 2, 0, 0))),
        ({}, _GAP, ((1 / 6,) * 3, _NOTHING, (1 / 2, 0, 0))),
    ],
    # 1 / 2 sequences.
    'sequence_sum': [
        ({}, _MASK, ((1 / 2,) * 3, (1 / 2, 0, 0))),
        ({}, _GAP, ((1 / 2,) * 3, _NOTHING, (1 / 2, 0, 0))),
    ],
    # One prompt of 4 tokens; then, from SkyRL's tests, two prompts of 3 and 4;
    # then the second of three prompts without a token, and half of the third.
    'prompt_mean': [
        ({'group_size': 2}, _MASK, ((1 / 4,) * 3, (1 / 4, 0, 0))),
        (
            {'group_size': 2}, ((1, 1), (1, 0), (1, 1), (1, 1)),
            ((1 / 6, 1 / 6), (1 / 6, 0), (1 / 8, 1 / 8), (1 / 8, 1 / 8)),
        ),
        (
            {'group_size': 2}, ((1, 1), (1, 0), (0, 0), (0, 0), (0, 0), (1, 1)),
            ((1 / 6, 1 / 6), (1 / 6, 0), (0, 0), (0, 0), (0, 0), (1 / 4,) * 2),
        ),
    ],
}

# Ten sequences of one token and what each row of the table of algorithms does
# with them. The rest of mu and of pi is spread evenly, so every divergence but
# `none` and `ratio_gap` is the binary one. A recomputed anchor is mu here.
#
#   mu    pi    A   ratio  TV     KL      gap    moves
#   .5    .75   +   1.5    .25    .1438   .5     out
#   .5    .75   -   1.5    .25    .1438   .5     back
#   .5    .28   +   .56    .22    .1076   .44    back
#   .5    .28   -   .56    .22    .1076   .44    out
#   .5    .55   +   1.1    .05    .0050   .1     out
#   .05   .5    -   10     .45    .4946   9      back, ratio above every cap
#   .4    .5    +   1.25   .10    .0201   .25    out
#   .99   .80   -   .8081  .19    .1810   .1919  out
#   .0001 .01   +   100    .0099  .0095   99     out, ratio above every cap
#   .5    .667  +   1.333  .1667  .0589   .3333  out
BEHAVIOUR = (0.5, 0.5, 0.5, 0.5, 0.5, 0.05, 0.4, 0.99, 1e-4, 0.5)
TARGET = (0.75, 0.75, 0.28, 0.28, 0.55, 0.5, 0.5, 0.8, 1e-2, 2 / 3)
SIGNS = (1, -1, 1, -1, 1, -1, 1, -1, 1, 1)

# name: gradient of each token's loss by its logprob, -min(ratio, C) A or 0.
_R = 0.80 / 0.99
_ALL = (-1.5, 1.5, -0.56, 0.56, -1.1, 10, -1.25, _R, -100, -4 / 3)
_TOPK_TV = (0, 1.5, -0.56, 0, -1.1, 5, -1.25, _R, -5, -4 / 3)  # .2, C 5
_TOPK_KL = (0, 1.5, -0.56, 0, -1.1, 5, -1.25, 0, -5, 0)  # .05, C 5
# -r A (1 - sign(A) (r - 1) / 12.5).
_SPO = (
    -1.44, 1.56, -0.56 * 1.0352, 0.56 * 0.9648, -1.1 * 0.992, 17.2,
    -1.25 * 0.98, _R * (1 - (1 - _R) / 12.5), 692, -4 / 3 * (1 - 1 / 37.5),
)
# .15, no cap: .19 and .1667 are outside. The same with KL .05.
_BINARY = (0, 1.5, -0.56, 0, -1.1, 10, -1.25, 0, -100, 0)
# 1.25 is inside [.8, 1.28], 1.333 is not.
_CLIP_HIGHER = (0, 1.5, -0.56, 0, -1.1, 10, -1.25, _R, 0, 0)
# mu = .0001 is below .1 and A > 0.
_RELAXED_HIGH = (0, 1.5, -0.56, 0, -1.1, 10, -1.25, _R, -100, 0)
ALGORITHMS = {
    'dppo_topk_tv': _TOPK_TV,
    'dppo_topk_kl': _TOPK_KL,
    'dppo_full_tv': _TOPK_TV,
    'dppo_full_kl': _TOPK_KL,
    'dppo_binary_tv': _BINARY,
    'dppo_binary_kl': _BINARY,
    'dppo_binary_tv_recompute': _BINARY,
    'dppo_binary_kl_recompute': _BINARY,
    # With an even rest its direction is that of the ratio; .05, no cap.
    'predictive_kl': _BINARY,
    # 1.25 is outside [.8, 1.2], .8081 is not.
    'grpo': (0, 1.5, -0.56, 0, -1.1, 10, 0, _R, 0, 0),
    'grpo_clip_higher': _CLIP_HIGHER,
    # As grpo; ratio 10 with A < 0 goes too.
    'ppo_dual_clip': (0, 1.5, -0.56, 0, -1.1, 0, 0, _R, 0, 0),
    'pg_is': _ALL,
    # Every token pushes; C 3.
    'cispo': (-1.5, 1.5, -0.56, 0.56, -1.1, 3, -1.25, _R, -3, -4 / 3),
    'pg_sequence_tis': (
        -1.5, 1.5, -0.56, 0.56, -1.1, 3, -1.25, _R, -3, -4 / 3,
    ),
    'minirl': _CLIP_HIGHER,
    # C 3.
    'minirl_tis': (0, 1.5, -0.56, 0, -1.1, 3, -1.25, _R, 0, 0),
    # No mu - pi reaches .5 here.
    'minimal_mask': _ALL,
    'minimal_mask_recompute': _ALL,
    'relaxed_high': _RELAXED_HIGH,
    'relaxed_low': _CLIP_HIGHER,  # mu = .05 with A < 0 comes back anyway.
    'relaxed_both': _RELAXED_HIGH,
    # .0003 and .0004: whatever moves out is outside.
    'gspo': (0, 1.5, -0.56, 0, 0, 10, 0, 0, 0, 0),
    'spo': _SPO,
    # -r A (1 - sign(A) (pi - mu) / 12.5).
    'drpo': (
        -1.47, 1.53, -0.56 * 1.0176, 0.56 * 0.9824, -1.1 * 0.996, 10.36,
        -1.25 * 0.992, _R * 0.9848, -99.9208, -4 / 3 * (1 - 1 / 75),
    ),
    # With |A| = 1 and lambda .04 = 1 / (2 * 12.5) it is SPO.
    'r2vpo': _SPO,
    'r2vpo_fixed': _SPO,
    # One token: w = 1 and an empty prefix, so D <= .15 is all.
    'cppo': _BINARY,
    # min(1, .15 / D): .6, .6818, .7895, .9.
    'cppo_soft': (
        -0.9, 1.5, -0.56, 0.56 * 15 / 22, -1.1, 10, -1.25, _R * 15 / 19, -100,
        -1.2,
    ),
    # KL <= .1, whatever the direction.
    'trm_max': (0, 0, 0, 0, -1.1, 0, -1.25, 0, -100, -4 / 3),
    'trm_mean': (0,) * 10,  # KL <= .002.
    # .5 <= r <= 5.
    'icepop': (-1.5, 1.5, -0.56, 0.56, -1.1, 0, -1.25, _R, 0, -4 / 3),
    # (ln r)^2 of what moves out: .164, .336, .009, .0498, .0454, 21, .083.
    'm2po': (0, 1.5, -0.56, 0, -1.1, 10, 0, 0, 0, 0),
}

# What the papers set: every number of a row, by the config's field. `threshold`
# is that of the divergence; group_mean, no cap, the behaviour policy as anchor
# and the constant normaliser where nothing is said.
_APP_C1 = (0.2, 0.28)  # arXiv:2602.04879 App. C.1, of clip-higher.
_TOP_K = {'divergence.k': 20, 'divergence.construction': 'union'}
_Z = {'advantage.name': 'group_zscore'}
_RECOMPUTED = {'anchor': 'recomputed'}
_ALPHA = {'threshold': _APP_C1, 'trust_region.alpha': 0.1}  # Sec. 6.
_CPPO = _TOP_K | _Z | {  # arXiv:2606.10968 Sec. 5, dense models.
    'threshold': 0.15,
    'trust_region.budget': 0.015,
    'trust_region.smallest_weight': 0.8,
}
PAPER_SETTINGS = {
    # arXiv:2602.04879 App. F.3.
    'dppo_topk_tv': {'threshold': 0.2, 'loss.ratio_cap': 5.0} | _TOP_K,
    'dppo_topk_kl': {'threshold': 0.05, 'loss.ratio_cap': 5.0} | _TOP_K,
    # As the top-K they stand for.
    'dppo_full_tv': {'threshold': 0.2, 'loss.ratio_cap': 5.0},
    'dppo_full_kl': {'threshold': 0.05, 'loss.ratio_cap': 5.0},
    'dppo_binary_tv': {'threshold': 0.15},  # App. C.1.
    'dppo_binary_kl': {'threshold': 0.05},  # App. C.1.
    'dppo_binary_tv_recompute': {'threshold': 0.15} | _RECOMPUTED,
    'dppo_binary_kl_recompute': {'threshold': 0.05} | _RECOMPUTED,  # Sec. 5.2.
    'predictive_kl': {'threshold': 0.05} | _TOP_K,  # Ours.
    'grpo': {'threshold': 0.2},  # arXiv:2402.03300.
    'grpo_clip_higher': {'threshold': _APP_C1},
    'ppo_dual_clip': {'threshold': 0.2, 'trust_region.ratio_limit': 3.0},
    'pg_is': {'threshold': math.inf},
    'cispo': {'threshold': math.inf, 'loss.ratio_cap': 3.0},  # App. C.1.
    'pg_sequence_tis': {
        'threshold': math.inf, 'loss.ratio_cap': 3.0, 'loss.ratio': 'sequence',
    },
    'minirl': {'threshold': _APP_C1} | _RECOMPUTED,
    'minirl_tis': {'threshold': _APP_C1, 'loss.ratio_cap': 3.0} | _RECOMPUTED,
    'minimal_mask': {'threshold': 0.5},  # Sec. 5.3.
    'minimal_mask_recompute': {'threshold': 0.5} | _RECOMPUTED,
    'relaxed_high': _ALPHA | {'trust_region.side': 'high'},
    'relaxed_low': _ALPHA | {'trust_region.side': 'low'},
    'relaxed_both': _ALPHA | {'trust_region.side': 'both'},
    # arXiv:2507.18071 Sec. 5.1.
    'gspo': {
        'threshold': (3e-4, 4e-4), 'loss.ratio': 'geometric',
        'normalizer.name': 'sequence_mean',
    } | _Z,
    # arXiv:2606.09821 Sec. 4.
    'spo': {'threshold': math.inf, 'loss.epsilon': 12.5},
    'drpo': {'threshold': math.inf, 'loss.delta': 12.5},
    # Ours: of arXiv:2601.03320 only the abstract could be read.
    'r2vpo': {
        'threshold': math.inf, 'loss.center': 'one', 'loss.ratio': 'token',
        'loss.per': 'batch', 'loss.stop_at_turning_point': False,
        'dual.name': 'projected_ascent', 'dual.limit': 0.01,
        'dual.initial': 0.04, 'dual.learning_rate': 0.02, 'dual.maximum': 10.0,
        'dual.by_age': False,
    },
    'r2vpo_fixed': {
        'threshold': math.inf, 'loss.center': 'one', 'loss.ratio': 'token',
        'loss.per': 'batch', 'dual.name': 'fixed', 'dual.multiplier': 0.04,
    },
    'cppo': _CPPO | {'trust_region.soft': False},
    'cppo_soft': _CPPO | {'trust_region.soft': True},
    'trm_max': {'threshold': 0.1, 'trust_region.statistic': 'max'} | _Z,
    'trm_mean': {'threshold': 0.002, 'trust_region.statistic': 'mean'} | _Z,
    # arXiv:2510.18855.
    'icepop': {
        'threshold': math.inf, 'trust_region.lowest': 0.5,
        'trust_region.highest': 5.0,
    },
    'm2po': {'threshold': math.inf, 'trust_region.limit': 0.04},
}
