"""What every row of the table of algorithms does to a token, by closed forms.

Each row goes through the objective of a run, with a table of logits in place of
a model. mu is the policy that sampled, pi the one that is trained, q the anchor
of the divergence; r = pi(a) / mu(a) of the sampled token a, which is token 0.
"""

import dataclasses
import functools
import math
import pathlib
import subprocess
import sys
from typing import NamedTuple

import hand_numbers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import table_model
import tiny_model

from dppo_jax import algorithms
from dppo_jax import divergences
from dppo_jax import losses
from dppo_jax import trust_regions
from dppo_jax.types import LossInputs
from dppo_jax.types import ScoredRollout

ROOT = pathlib.Path(__file__).resolve().parents[1]
VOCABULARY = 24

each_row = pytest.mark.parametrize('name', algorithms.names())
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)


# --- the gradient table ------------------------------------------------------
#
# Written again in NumPy, float64, without looking at what it checks.


class Case(NamedTuple):
  """One token. Distributions are [V]; token 0 was sampled."""

  mu: np.ndarray
  pi: np.ndarray
  q: np.ndarray  # The recomputed anchor.
  advantage: float


class Expected(NamedTuple):
  weight: float  # Of A grad log pi.
  place: str  # inside, out or back.
  margin: float  # Relative distance to the nearest threshold.
  brake: float = 0.0  # Weight of grad log pi, whatever A is.


def ratio_of(case, anchor='mu'):
  return case.pi[0] / getattr(case, anchor)[0]


def ratio_gap(p, pi):
  return abs(pi[0] / p[0] - 1)


def tv(p, pi):
  return np.sum(np.abs(p - pi)) / 2


def kl(p, pi):
  return np.sum(p * np.log(p / pi))


def merged(measure, k):
  """`measure` after all but the top k of p and token 0 are made one."""

  def measure_merged(p, pi):
    explicit = sorted({0, *np.argsort(-p)[:k]})
    buckets = lambda x: np.append(x[explicit], 1 - np.sum(x[explicit]))
    return measure(buckets(p), buckets(pi))

  return measure_merged


topk_tv, topk_kl = merged(tv, 20), merged(kl, 20)
binary_tv, binary_kl = merged(tv, 0), merged(kl, 0)


def outward(measure, low, high=None, *, anchor='mu', cap=math.inf):
  """PPO and DPPO: drop what is outside and moves further out."""

  def expected(case):
    p = getattr(case, anchor)
    limit = (high or low) if case.advantage > 0 else low
    divergence = measure(p, case.pi)
    out = case.advantage * (case.pi[0] - p[0]) > 0
    place = 'inside' if divergence <= limit else 'out' if out else 'back'
    weight = 0 if place == 'out' else min(ratio_of(case), cap)
    return Expected(weight, place, abs(divergence / limit - 1))

  return expected


def predictive(case):
  """topk_kl, direction (pi - mu) . (e_a - pi) over the 20 buckets and rest."""
  base = outward(topk_kl, 0.05)(case)
  explicit = sorted({0, *np.argsort(-case.mu)[:20]})
  buckets = lambda x: np.append(x[explicit], 1 - np.sum(x[explicit]))
  mu, pi = buckets(case.mu), buckets(case.pi)
  dot = pi[0] - mu[0] - np.sum(pi * (pi - mu))
  place = base.place
  if place != 'inside':
    place = 'out' if case.advantage * dot > 0 else 'back'
  weight = 0 if place == 'out' else ratio_of(case)
  return Expected(weight, place, min(base.margin, abs(dot) * 1e4))


def unmasked(weight, brake=lambda case: 0.0):
  """No region: `weight(case)` for every token."""
  return lambda case: Expected(weight(case), 'inside', 1, brake(case))


def dual_clip(case):
  base = outward(ratio_gap, 0.2)(case)
  if case.advantage < 0 and ratio_of(case) > 3:
    base = base._replace(weight=0)
  return base._replace(margin=min(base.margin, abs(ratio_of(case) / 3 - 1)))


def minimal(anchor):

  def expected(case):
    fall = getattr(case, anchor)[0] - case.pi[0]
    gap = abs(fall)
    out = case.advantage * fall < 0
    place = 'inside' if gap < 0.5 else 'out' if out else 'back'
    dropped = case.advantage < 0 and fall >= 0.5
    weight = 0 if dropped else ratio_of(case)
    return Expected(weight, place, abs(gap / 0.5 - 1))

  return expected


def relaxed(*signs):

  def expected(case):
    base = outward(ratio_gap, 0.2, 0.28)(case)
    if case.mu[0] < 0.1 and np.sign(case.advantage) in signs:
      base = base._replace(weight=ratio_of(case))
    return base

  return expected


def spo(case):
  r = ratio_of(case)
  return r * (1 - np.sign(case.advantage) * (r - 1) / 12.5)


def drpo(case):
  """Eq. 9 of arXiv:2606.09821: 1 - sign(A (r - 1)) |pi - mu| / delta."""
  r, gap = ratio_of(case), abs(case.pi[0] - case.mu[0])
  return r * (1 - np.sign(case.advantage * (r - 1)) * gap / 12.5)


def variance(case):
  """Of lambda (r - 1)^2 with lambda .04, times r for d r = r d log pi."""
  r = ratio_of(case)
  return 2 * 0.04 * r * (r - 1)


def soft_prefix(case):
  """Of one token the prefix is the token: min(1, .15 / D) on the way out."""
  base = outward(topk_tv, 0.15)(case)
  if base.place == 'out':
    share = 0.15 / topk_tv(case.mu, case.pi)
    base = base._replace(weight=share * ratio_of(case))
  return base._replace(margin=1)


def whole_sequence(limit):
  """Of one token: dropped wherever it moves."""

  def expected(case):
    divergence = topk_kl(case.mu, case.pi)
    out = case.advantage * (case.pi[0] - case.mu[0]) > 0
    place = 'inside' if divergence <= limit else 'out' if out else 'back'
    weight = ratio_of(case) if place == 'inside' else 0
    return Expected(weight, place, abs(divergence / limit - 1))

  return expected


def band(case):
  r = ratio_of(case)
  place = 'inside'
  if not 0.5 <= r <= 5:
    place = 'out' if case.advantage * (r - 1) > 0 else 'back'
  weight = r if place == 'inside' else 0
  return Expected(weight, place, min(abs(r / 0.5 - 1), abs(r / 5 - 1)))


ROWS = {
    'dppo_topk_tv': outward(topk_tv, 0.2, cap=5),
    'dppo_topk_kl': outward(topk_kl, 0.05, cap=5),
    'dppo_binary_tv': outward(binary_tv, 0.15),
    'dppo_binary_kl': outward(binary_kl, 0.05),
    'dppo_full_tv': outward(tv, 0.2, cap=5),
    'dppo_full_kl': outward(kl, 0.05, cap=5),
    'dppo_binary_tv_recompute': outward(binary_tv, 0.15, anchor='q'),
    'dppo_binary_kl_recompute': outward(binary_kl, 0.05, anchor='q'),
    'predictive_kl': predictive,
    'grpo': outward(ratio_gap, 0.2),
    'grpo_clip_higher': outward(ratio_gap, 0.2, 0.28),
    'ppo_dual_clip': dual_clip,
    'pg_is': unmasked(ratio_of),
    'cispo': unmasked(lambda case: min(ratio_of(case), 3)),
    'pg_sequence_tis': unmasked(lambda case: min(ratio_of(case), 3)),
    'minirl': outward(ratio_gap, 0.2, 0.28, anchor='q'),
    'minirl_tis': outward(ratio_gap, 0.2, 0.28, anchor='q', cap=3),
    'minimal_mask': minimal('mu'),
    'minimal_mask_recompute': minimal('q'),
    'relaxed_high': relaxed(1),
    'relaxed_low': relaxed(-1),
    'relaxed_both': relaxed(1, -1),
    'gspo': outward(ratio_gap, 3e-4, 4e-4),
    'spo': unmasked(spo),
    'drpo': unmasked(drpo),
    'r2vpo': unmasked(ratio_of, variance),
    'r2vpo_fixed': unmasked(ratio_of, variance),
    'cppo': outward(topk_tv, 0.15),
    'cppo_soft': soft_prefix,
    'trm_max': whole_sequence(0.1),
    'trm_mean': whole_sequence(0.002),
    'icepop': band,
    # (log r)^2 of one token on the way out against .04: |log r| <= .2.
    'm2po': outward(lambda p, pi: np.log(pi[0] / p[0]) ** 2, 0.04),
}


@functools.cache
def cases():
  """Tokens everywhere: probable and not, nearly unmoved to far away."""
  rng = np.random.RandomState(0)
  drawn = []

  def policy(p, rest):
    return np.append(p, (1 - p) * rest)

  for p in (0.0004, 0.03, 0.2, 0.45, 0.7, 0.93):
    rest, other = rng.dirichlet(np.full(VOCABULARY - 1, 0.7), 2) + 1e-4
    rest, other = rest / np.sum(rest), other / np.sum(other)
    for i, r in enumerate((
        0.02, 0.22, 0.45, 0.6, 0.79, 0.9, 0.9999, 1.0001, 1.1, 1.25, 1.4, 2.1,
        3.6, 7, 20, 40,
    )):
      if p * r > 0.985:
        continue
      for far in (0.0, 0.4):
        q = p * (1.0, r**0.5, min(1.3 * r, 0.985 / p), r)[i % 4]
        drawn += [
            Case(
                mu=policy(p, rest),
                pi=policy(p * r, (1 - far) * rest + far * other),
                q=policy(q, (rest + other) / 2),
                advantage=advantage,
            )
            for advantage in (1.5, 0.0, -0.75)
        ]
  return drawn


def slopes_of_cases(name, **options):
  column = lambda field: hand_numbers.logs(
      [getattr(case, field) for case in cases()]
  )[:, None]
  return table_model.slopes(
      name,
      behaviour=column('mu'),
      target=column('pi'),
      anchor=column('q'),
      tokens=np.zeros((len(cases()), 1), np.int32),
      advantages=np.asarray([[case.advantage] for case in cases()]),
      **options,
  )[:, 0]


def test_every_row_has_its_closed_form():
  assert list(ROWS) == algorithms.names(), 'add a row to ROWS, in order'


@each_row
def test_gradient_of_a_row_is_its_closed_form_in_every_cell(name):
  got = slopes_of_cases(name)
  cap = dict(algorithms.row(name).loss).get('ratio_cap', math.inf)
  cells = set()
  for case, slope in zip(cases(), got, strict=True):
    expected = ROWS[name](case)
    if expected.margin < 2e-3:
      continue  # Rounding decides.
    sign = int(np.sign(case.advantage))
    cells.add((sign, expected.place, ratio_of(case) > cap))
    # With an advantage of 0 the weight multiplies nothing; a brake is left.
    slope_expected = expected.brake - expected.weight * case.advantage
    close(slope, slope_expected, err_msg=str(case))
  places = {'inside', 'out', 'back'}
  if ROWS[name](cases()[0]).margin == 1 and name != 'cppo_soft':
    places = {'inside'}
  for sign in (1, -1):
    assert {p for s, p, _ in cells if s == sign} == places
    if cap < math.inf:
      assert {above for s, _, above in cells if s == sign} == {False, True}
  assert {'inside'} <= {p for s, p, _ in cells if s == 0}


# --- anchors -----------------------------------------------------------------


def tables(*probabilities):
  """[T] probabilities of token 0, the rest even -> [1, T, V] logits, each."""

  def table(p):
    p = np.atleast_1d(np.asarray(p, np.float64))[:, None]
    rest = np.broadcast_to((1 - p) / (VOCABULARY - 1),
                           (len(p), VOCABULARY - 1))
    return hand_numbers.logs(np.concatenate([p, rest], 1))[None]

  return [table(p) for p in probabilities]


def sequence(name, *, mu, pi, advantage, q=None):
  """Gradient of the tokens of one sequence. [T] probabilities -> [T]."""
  behaviour, target, anchor = tables(mu, pi, mu if q is None else q)
  return table_model.slopes(
      name,
      behaviour=behaviour,
      target=target,
      anchor=anchor,
      tokens=np.zeros(behaviour.shape[:2], np.int32),
      advantages=advantage,
  )[0]


@pytest.mark.parametrize(
    'recomputed, behaviour',
    [
        # KL(.5 -> .49) = .0002 and r = .98 against the recomputed anchor;
        # KL(.1 -> .49) = .352 against the policy that sampled.
        ('dppo_binary_kl_recompute', 'dppo_binary_kl'),
        ('dppo_binary_tv_recompute', 'dppo_binary_tv'),
        ('minirl', 'grpo_clip_higher'),
    ],
)
def test_recomputed_anchor_keeps_what_the_behaviour_policy_s_drops(
    recomputed, behaviour
):
  token = {'mu': 0.1, 'q': 0.5, 'pi': 0.49, 'advantage': 1.0}
  # The importance ratio is against the policy that sampled all the same.
  close(sequence(recomputed, **token), [-4.9])
  close(sequence(behaviour, **token), [0])


def test_recomputed_anchor_of_the_minimal_mask():
  # mu - pi = .7 >= .5, q - pi = .1.
  token = {'mu': 0.9, 'q': 0.3, 'pi': 0.2, 'advantage': -1.0}
  close(sequence('minimal_mask', **token), [0])
  close(sequence('minimal_mask_recompute', **token), [2 / 9])
  # Fallen from mu, but risen by .6 from q; then the other way round.
  risen = {'mu': 0.9, 'q': 0.2, 'pi': 0.8, 'advantage': -1.0}
  close(sequence('minimal_mask_recompute', **risen), [8 / 9])
  fallen = {'mu': 0.1, 'q': 0.9, 'pi': 0.3, 'advantage': -1.0}
  close(sequence('minimal_mask_recompute', **fallen), [0])
  close(sequence('minimal_mask', **fallen), [3])


# --- published numbers -------------------------------------------------------


def test_icepop_keeps_only_the_token_within_the_band():
  # From rLLM's tests: r .3 1 10, band [.5, 5], A = 1.
  behaviour, target = tables((0.05,) * 3, (0.015, 0.05, 0.5))
  inputs = {
      'behaviour': behaviour,
      'target': target,
      'tokens': np.zeros((1, 3), np.int32),
      'advantages': 1.0,
  }
  close(table_model.slopes('icepop', **inputs), [[0, -1, 0]])
  _, stats = table_model.seen('icepop', **inputs)
  np.testing.assert_array_equal(stats.trust_region, [[0, 1, 0]])


@pytest.mark.parametrize(
    'mu, pi, threshold, dot, kl, slopes, by_ratio',
    [
        # r 1.25: gap .1 -.1 0; .1 - (.05 - .02) = .07, out for A > 0.
        ((0.4, 0.3, 0.3), (0.5, 0.2, 0.3), 0.01, 0.07, 0.032382, (0, 1.25),
         (0, 1.25)),
        # A tail of 8 as one: gap .05 .15 -.2; .05 - (.0225 + .0525 - .04) =
        # .015, out for A > 0. Gaps spread over the tail evenly would give
        # -.02; this row follows the aggregated tail.
        ((0.4, 0.2, *(0.05,) * 8), (0.45, 0.35, *(0.025,) * 8), 0.05, 0.015,
         0.118221, (0, 1.125), (0, 1.125)),
        # r 1.125 > 1, but token 1 has grown more: .05 - (.0225 + .1 - .0125)
        # = -.06, back for A > 0 and out for A < 0. The ratio says the opposite.
        ((0.4, 0.3, 0.3), (0.45, 0.5, 0.05), 0.05, -0.06, 0.337165,
         (-1.125, 0), (0, 1.125)),
    ],
)
def test_predictive_mask_follows_the_gradient_step(
    mu, pi, threshold, dot, kl, slopes, by_ratio
):
  options = {'k': 2, 'threshold': threshold}
  predictive = divergences.build('predictive_kl', **options)
  behaviour, target = hand_numbers.logs(mu), hand_numbers.logs(pi)
  recorded = predictive.record(behaviour, jnp.asarray(0))
  inputs = (target, jnp.asarray(0), recorded)
  close(predictive.direction(*inputs), dot, atol=1e-6)
  close(predictive.measure(*inputs), kl)
  for divergence, expected in (
      (predictive, slopes),
      (divergences.build('topk_kl', **options), by_ratio),
  ):
    got = table_model.slopes(
        'predictive_kl',
        divergence=divergence,
        behaviour=jnp.stack([behaviour] * 2)[None],
        target=jnp.stack([target] * 2)[None],
        tokens=np.zeros((1, 2), np.int32),
        advantages=np.asarray([[1.0, -1.0]]),
    )
    close(got, [expected])


# --- sequences ---------------------------------------------------------------


@pytest.mark.parametrize(
    'name, mu, pi, advantage, slopes',
    [
        # r 1.5 1.2, geometric mean s = sqrt(1.8) = 1.341641: outside, and out
        # for A > 0.
        ('gspo', (0.4, 0.5), (0.6, 0.6), 1, (0, 0)),
        ('gspo', (0.4, 0.5), (0.6, 0.6), -1, (1.341641, 1.341641)),
        # One token far up, one far down: r 2 and .5, s = 1.
        ('gspo', (0.3, 0.6), (0.6, 0.3), 1, (-1, -1)),
        # r 1.5 1.2: product 1.8; r 2 2: product 4, cap 3.
        ('pg_sequence_tis', (0.4, 0.5), (0.6, 0.6), 1, (-1.8, -1.8)),
        ('pg_sequence_tis', (0.3, 0.3), (0.6, 0.6), -2, (6, 6)),
        # D .1 .1 .1; w D .1 .09 .08; S .1 .19 .27 against .15 .165 .1785.
        ('cppo', (0.5,) * 3, (0.6,) * 3, 1, (-1.2, 0, 0)),
        ('cppo', (0.5,) * 3, (0.6,) * 3, -1, (1.2, 1.2, 1.2)),
        # 1.2 times 1, .165 / .19, .1785 / .27.
        ('cppo_soft', (0.5,) * 3, (0.6,) * 3, 1, (-1.2, -1.042105, -0.793333)),
        # KL .0204 .1438: the second is above .1 and takes the first with it.
        ('trm_max', (0.5, 0.5), (0.6, 0.75), 1, (0, 0)),
        ('trm_max', (0.5, 0.5), (0.6, 0.75), -1, (0, 0)),
        ('trm_max', (0.5, 0.5), (0.6, 0.6), 1, (-1.2, -1.2)),
        # KL .0008 .0050: mean .0029; .0050 0 0: mean .0017, limit .002.
        ('trm_mean', (0.5, 0.5), (0.52, 0.55), 1, (0, 0)),
        ('trm_mean', (0.5,) * 3, (0.55, 0.5, 0.5), 1, (-1.1, -1, -1)),
        # (log r)^2 .1644 .0332 .0091: means .0689, without the first .0212.
        ('m2po', (0.4, 0.5, 0.5), (0.6, 0.6, 0.55), 1, (0, -1.2, -1.1)),
        ('m2po', (0.4, 0.5, 0.5), (0.6, 0.6, 0.55), -1, (1.5, 1.2, 1.1)),
    ],
)
def test_sequences_by_hand(name, mu, pi, advantage, slopes):
  got = sequence(name, mu=mu, pi=pi, advantage=float(advantage))
  close(got, slopes)


class Rows(NamedTuple):
  """Random tokens as NumPy arrays [B, T]; two sequences a row and padding."""

  divergence: np.ndarray
  log_ratio: np.ndarray
  advantages: np.ndarray
  token_mask: np.ndarray
  segment_ids: np.ndarray

  def sequences(self):
    """Yields the indices of the sampled tokens of each sequence."""
    for row, mask in enumerate(self.token_mask):
      ids = self.segment_ids[row]
      for i in set(ids[mask]):
        yield row, np.flatnonzero(mask & (ids == i))

  def region(self, name, *, threshold=0.15, **options):
    as_jax = {k: jnp.asarray(v) for k, v in self._asdict().items()}
    inputs = trust_regions.RegionInputs(
        **as_jax,
        direction=as_jax['log_ratio'],
        anchor_logprobs=-jnp.ones_like(as_jax['log_ratio']),
        threshold=threshold,
    )
    region = jax.jit(
        lambda x: trust_regions.build(name, **options)(
            inputs._replace(**x)
        )
    )(as_jax)
    return np.asarray(region, np.float32)


def random_rows(seed, *, scale=0.1):
  rng = np.random.RandomState(seed)
  shape = (40, 12)
  cut = rng.randint(2, 10, (shape[0], 1))
  log_ratio = scale * 2 * rng.standard_normal(shape)
  signs = rng.choice([-1.0, 0.0, 1.0, 1.0], shape)  # Even within a sequence.
  return Rows(
      divergence=(scale * rng.exponential(size=shape)).astype(np.float32),
      log_ratio=log_ratio.astype(np.float32),
      advantages=signs.astype(np.float32),
      token_mask=rng.uniform(size=shape) < 0.8,
      segment_ids=np.where(np.arange(shape[1]) < cut, 1, 2).astype(np.int32),
  )


def moves_out(rows, row, t):
  return rows.advantages[row, t] * rows.log_ratio[row, t] > 0


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('threshold', [0.15, (0.05, 0.1)])
def test_cumulative_prefix_is_the_loop_of_its_paper(seed, threshold):
  rows = random_rows(seed)
  hard = rows.region('cumulative_prefix', threshold=threshold)
  soft = rows.region('cumulative_prefix', threshold=threshold, soft=True)
  low, high = divergences.low_high(threshold)
  dropped = 0
  for row, tokens in rows.sequences():
    s = w_before = 0.0
    for i, t in enumerate(tokens):
      # Eq. 9, then the two conditions of Eq. 10.
      w = 1 - 0.2 * i / max(len(tokens) - 1, 1)
      delta = high if rows.advantages[row, t] > 0 else low
      weighted = w * float(rows.divergence[row, t])
      s += weighted
      within = delta + 0.015 * w_before
      x = max(weighted / delta, s / within)
      w_before += w
      if not moves_out(rows, row, t):
        assert hard[row, t] == soft[row, t] == 1
        continue
      close(soft[row, t], min(1, 1 / x))
      if abs(x - 1) > 1e-4:
        assert hard[row, t] == (x <= 1)
        dropped += x > 1
  assert dropped > 10


@pytest.mark.parametrize('statistic', ['max', 'mean'])
def test_sequence_divergence_is_brute_force(statistic):
  rows = random_rows(0)
  limit = {'max': 0.2, 'mean': 0.1}[statistic]
  region = rows.region(
      'sequence_divergence', threshold=limit, statistic=statistic
  )
  outcomes = set()
  for row, tokens in rows.sequences():
    value = getattr(np, statistic)(rows.divergence[row, tokens])
    assert set(region[row, tokens]) == {float(value <= limit)}
    outcomes.add(value <= limit)
  assert outcomes == {True, False}


@pytest.mark.parametrize('seed', range(3))
def test_second_moment_drops_the_largest_until_the_rest_is_within(seed):
  rows = random_rows(seed)
  region = rows.region('second_moment')
  dropped = 0
  for row, tokens in rows.sequences():
    kept = list(tokens)
    moment = {t: float(rows.log_ratio[row, t]) ** 2 for t in tokens}
    candidates = [t for t in tokens if moves_out(rows, row, t)]
    while candidates and np.mean([moment[t] for t in kept]) > 0.04:
      largest = max(candidates, key=moment.get)
      candidates.remove(largest)
      kept.remove(largest)
    dropped += len(tokens) - len(kept)
    expected = [float(t in kept) for t in tokens]
    np.testing.assert_array_equal(region[row, tokens], expected)
  assert dropped > 10


# --- identities --------------------------------------------------------------


def test_grpo_has_the_gradient_of_ppo_s_clip():
  taken = np.asarray([case.advantage for case in cases()])
  r = np.asarray([ratio_of(case) for case in cases()])

  def clip(log_r):
    ratio = jnp.exp(log_r)
    clipped = jnp.clip(ratio, 0.8, 1.28)
    return -jnp.sum(jnp.minimum(ratio * taken, clipped * taken))

  expected = jax.grad(clip)(jnp.log(jnp.asarray(r)))
  close(slopes_of_cases('grpo_clip_higher'), expected)


_BY_THRESHOLD = ('outward', 'relaxed', 'minimal', 'sequence_ratio')


@pytest.mark.parametrize('name', [
    name for name, row in algorithms.TABLE.items()
    if row.trust_region['name'] in _BY_THRESHOLD
])
def test_infinite_threshold_is_the_importance_weighted_policy_gradient(name):
  row = algorithms.row(name)
  options = tiny_model.row_options(name)
  rows = random_rows(0, scale=2.0)
  region = rows.region(row.trust_region['name'], threshold=math.inf)
  np.testing.assert_array_equal(region, np.ones_like(region))
  if row.loss != {'name': 'policy_gradient'}:
    return
  anchor = -jnp.ones(region.shape)
  mask = jnp.asarray(rows.token_mask)

  def total(logprobs):
    loss, _ = options['loss_fn'](LossInputs(
        logprobs=logprobs,
        behaviour_logprobs=anchor,
        divergence=jnp.asarray(rows.divergence),
        trust_region=jnp.asarray(region),
        advantages=jnp.asarray(rows.advantages),
        token_mask=mask,
    ))
    return jnp.sum(loss)

  got = jax.grad(total)(anchor + rows.log_ratio)
  expected = -np.exp(rows.log_ratio) * rows.advantages * rows.token_mask
  close(got, expected)


def test_gspo_of_single_tokens_is_ppo_with_its_thresholds():
  same = divergences.build(
      'ratio_gap', threshold_low=3e-4, threshold_high=4e-4
  )
  close(slopes_of_cases('gspo'), slopes_of_cases('grpo', divergence=same))


@pytest.mark.parametrize('name, limit', [('spo', 'epsilon'), ('drpo', 'delta')])
def test_unlimited_penalty_is_the_importance_weighted_policy_gradient(
    name, limit
):
  loose = losses.build(name, **{limit: 1e12})
  close(slopes_of_cases(name, loss_fn=loose), slopes_of_cases('pg_is'))


# Fast rows stand for the rules; the others wait for a run with slow tests.
_FAST = ('dppo_topk_tv', 'minirl_tis', 'gspo', 'cppo_soft', 'm2po')


@pytest.mark.parametrize('name', [
    name if name in _FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in algorithms.names()
])
def test_micro_batches_do_not_change_what_a_row_learns(name):
  # 8 rows of 5 tokens, the last ones padding; sampled by another policy than
  # the one that learns, so that regions and ratios matter.
  keys = jax.random.split(jax.random.key(0), 3)
  logits = 2 * jax.random.normal(keys[0], (8, 5, VOCABULARY))
  start = logits + 0.3 * jax.random.normal(keys[1], logits.shape)
  tokens = jax.random.categorical(keys[2], logits)
  mask = np.arange(5) < np.asarray([5, 3, 1, 4, 5, 2, 3, 5])[:, None]
  options = tiny_model.row_options(name, horizon=5)
  rollout = table_model.make_rollout(
      options['divergence'], behaviour=logits, tokens=tokens, token_mask=mask
  )
  rewards = jnp.asarray([1.0, 0, 0, 1, 0, 0, 1, 0])
  state = tiny_model.make_state(
      start.reshape(-1, VOCABULARY), dual=options['dual']
  )

  def learn(num_microbatches):
    learn_fn = tiny_model.make_learner(
        model=table_model.MODEL,
        num_microbatches=num_microbatches,
        num_minibatches=2,
        **options,
    )
    scored = ScoredRollout(rollout, rewards)
    new, _, _ = tiny_model.jit(learn_fn)(state, scored, jax.random.key(1))
    return new.params

  whole, parts = learn(1), learn(2)
  np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)
  if name != 'trm_mean':  # Its .002 drops every sequence here.
    assert jnp.max(jnp.abs(whole - state.params)) > 1e-3


# --- the table itself --------------------------------------------------------


def test_the_page_of_the_documentation_is_the_table():
  page = (ROOT / 'docs' / 'algorithms.md').read_text()
  assert page == algorithms.as_markdown(), (
      'run python -m dppo_jax.algorithms --markdown > docs/algorithms.md'
  )


def test_the_command_prints_every_row():
  command = [sys.executable, '-W', 'error', '-m', 'dppo_jax.algorithms']
  run = functools.partial(
      subprocess.run, cwd=ROOT, check=True, capture_output=True, text=True
  )
  text, page = run(command), run([*command, '--markdown'])
  assert not text.stderr and not page.stderr
  assert [line.split()[0] for line in text.stdout.splitlines()] == [
      'name', *algorithms.names()
  ]
  assert page.stdout == algorithms.as_markdown()


def test_every_part_of_a_row_has_options():
  row = algorithms.Algorithm(
      source='here',
      keeps='all',
      advantage={'name': 'group_zscore', 'epsilon': 0.5},
      normalizer={'name': 'token_mean'},
  )
  assert row.config()['advantage'].epsilon == 0.5
  assert row.config()['normalizer'].name == 'token_mean'
  misspelled = dataclasses.replace(
      row, advantage={'name': 'group_zscore', 'epsilom': 0.5}
  )
  with pytest.raises(KeyError, match='Did you mean "epsilon"'):
    misspelled.config()


def test_the_page_tells_the_thresholds_of_a_row():
  assert algorithms.thresholds('grpo_clip_higher') == '0.2 / 0.28'
  assert algorithms.thresholds('dppo_topk_tv') == '0.2'
  assert algorithms.thresholds('pg_is') == ''
  line = next(
      line for line in algorithms.as_markdown().splitlines()
      if line.startswith('| `gspo` |')
  )
  assert '0.0003 / 0.0004' in line and 'arXiv:2507.18071' in line
