"""How long a program takes at least, from a chip's published rates.

A phase takes the longest of three times, as if each hid the others behind it:
operations at the chip's peak, bytes at its memory's bandwidth, and what leaves
it over the links of one axis of the torus. A real step takes longer; what the
estimate is good for is to compare plans, and to see what bounds them.
"""

from typing import NamedTuple

from dppo_jax import hlo
from dppo_jax import operations
from dppo_jax.chips import Chip


class Phase(NamedTuple):
  """One phase of a step on one device.

  Attributes:
    name: of the phase.
    flops: operations.
    traffic: bytes of main memory.
    sent: bytes that leave the device.
    collectives: that it takes part in.
  """

  name: str
  flops: float
  traffic: float
  sent: float
  collectives: dict[str, float]  # Kind -> how many.

  def seconds(self, chip: Chip) -> dict[str, float]:
    """What each of the three takes by itself."""
    return {
        'compute': self.flops / chip.flops,
        'memory': self.traffic / chip.memory_bandwidth,
        'network': self.sent / (chip.link_bandwidth / chip.torus_axes),
    }

  def bound(self, chip: Chip) -> tuple[str, float]:
    """The one that takes longest, and its seconds."""
    return max(self.seconds(chip).items(), key=lambda x: x[1])


def phases(
    names: tuple[str, ...],
    flops: operations.Count,
    program: hlo.Program,
    steps: list[hlo.Executed],
    *,
    num_devices: int,
) -> list[Phase]:
  """What each phase of a compiled program does on one device.

  Args:
    names: of phases, in the order in which they run.
    flops: over all devices; they are taken to share it evenly.
    program: compiled.
    steps: from `hlo.executed`.
    num_devices: that it runs on.
  """
  sent = dict.fromkeys(names, 0.0)
  traffic = dict.fromkeys(names, 0.0)
  kinds = {name: {} for name in names}
  for step in steps:
    if step.phase in traffic:
      traffic[step.phase] += step.times * hlo.traffic(program, step)
  for found in hlo.collectives(program, steps, num_devices=num_devices):
    if found.phase in sent:
      sent[found.phase] += found.times * found.sent
      kind = kinds[found.phase]
      kind[found.kind] = kind.get(found.kind, 0) + found.times
  return [
      Phase(
          name,
          flops.get(name, 0.0) / num_devices,
          traffic[name],
          sent[name],
          kinds[name],
      )
      for name in names
  ]


def step_seconds(found: list[Phase], chip: Chip) -> float:
  """Of a whole step."""
  return sum(phase.bound(chip)[1] for phase in found)
