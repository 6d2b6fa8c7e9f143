"""What is plotted of runs: a row of `PLOTS` is a plot on every page."""

from collections.abc import Mapping
import dataclasses


@dataclasses.dataclass(frozen=True)
class Plot:
  """One plot: its title, how to read it, its curves.

  `curves` has the label of each logged key. A key that ends in * draws every
  key it matches, and the * of its label is what the * of the key stood for.
  """

  title: str
  caption: str
  curves: Mapping[str, str]
  unit: str = ''
  log: bool = False  # Where the values span more than a decade.
  markers: bool = False  # Few points, each drawn as it is; never smoothed.
  stacked: bool = False
  threshold: bool = False  # Draws the config's divergence thresholds.

  def label(self, pattern: str, key: str) -> str:
    """What a logged key that `pattern` of `curves` matches is called."""
    before, _, after = pattern.partition('*')
    star = key[len(before) : len(key) - len(after)]
    return self.curves[pattern].replace('*', star)


PLOTS = (
    Plot(
        'Reward',
        'Mean reward of the sampled completions.',
        {'reward/mean': 'mean'},
    ),
    Plot(
        'Held-out accuracy',
        'avg@k: mean reward of k attempts. pass@k: one of k earns 1.',
        {'eval/avg@*': 'avg@*', 'eval/pass@*': 'pass@*'},
        markers=True,
    ),
    Plot(
        'Divergence',
        'Of the trained from the sampling policy, over tokens; only tokens '
        'above the threshold can be masked.',
        {'divergence/mean': 'mean', 'divergence/max': 'max'},
        log=True,
        threshold=True,
    ),
    Plot(
        'Masked tokens',
        'Share of the tokens of that sign of the advantage A that the trust '
        'region drops.',
        {'mask/positive': 'A > 0', 'mask/negative': 'A < 0'},
    ),
    Plot(
        'Policy gap |pi - mu|',
        'Means over sampled tokens, pi of the learner, mu of the sampler. '
        'Age 0: same weights on both sides, so numerics alone, the '
        'training-inference mismatch. Max: the largest pi - mu of all updates.',
        {
            'on_policy/prob_gap_mean': 'age 0',
            'mismatch/prob_gap_mean': 'all updates',
            'mismatch/prob_gap_max': 'max',
        },
        log=True,
    ),
    Plot(
        'Ratio',
        'How far r = pi / mu of sampled tokens is from 1. k3 = mean of '
        'r - 1 - log r estimates KL(mu || pi).',
        {'ratio/second_moment': 'E(r-1)^2', 'ratio/k3': 'k3'},
        log=True,
    ),
    Plot(
        'Constraint',
        'Mean of (r - 1)^2 as the constrained loss counts it, and share of '
        'tokens beyond the turning point, where the brake is stronger than '
        'the reward.',
        {
            'constraint/value': 'E(r-1)^2',
            'constraint/beyond_turning_point': 'beyond',
        },
        log=True,
    ),
    Plot(
        'Multiplier',
        'Price of the constraint: rises while it is violated.',
        {'dual/multiplier': 'mean', 'by_age/*/multiplier': 'age *'},
    ),
    Plot(
        'Replay',
        'Share of what is learned from that was sampled before, by tokens and '
        'by gradient: the sum of |factor of grad log pi|.',
        {
            'replay/token_share': 'tokens',
            'replay/gradient_share': 'gradient',
        },
    ),
    Plot(
        'Divergence by age',
        'Mean over tokens that were sampled so many optimizer updates ago.',
        {'by_age/*/divergence_mean': 'age *'},
        log=True,
    ),
    Plot(
        'Top-K mass',
        'Probability of the explicit buckets under the sampling policy: the '
        'nearer to 1, the tighter the divergence.',
        {'topk/mass_mean': 'mean', 'topk/mass_min': 'min'},
    ),
    Plot(
        'Entropy',
        'Mean entropy of the policy per sampled token.',
        {'entropy/mean': 'mean'},
        unit='nats',
    ),
    Plot(
        'Completion length',
        'Mean number of sampled tokens.',
        {'completion/length_mean': 'mean'},
        unit='tokens',
    ),
    Plot(
        'Truncated completions',
        'Share that met the length limit before an end token.',
        {'completion/truncated': 'truncated'},
    ),
    Plot(
        'Step time',
        'Where a step spends its time.',
        {
            'time/learn_s': 'learn',
            'time/sample_s': 'sample',
            'time/score_s': 'score',
        },
        unit='s',
        stacked=True,
    ),
    Plot(
        'Gradient norm',
        'Before clipping.',
        {'optimizer/grad_norm': 'norm'},
        log=True,
    ),
)
