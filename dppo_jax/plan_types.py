"""What a plan is: chips, what was taken for granted, what was counted."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from dppo_jax import roofline
from dppo_jax.chips import Chip


class Topology(NamedTuple):
  """Chips that need not exist."""

  name: str
  chip: Chip
  devices: list[Any]


@dataclasses.dataclass(frozen=True)
class Expected:
  """What the estimates take for granted.

  Attributes:
    mean_length: tokens of a completion.
    decode_steps: of the decode loop.
    microbatches: of a mini-batch, that packed rows fill.
    chunks: of the head, that the sampled tokens of a micro-batch fill on a
      device.
  """

  mean_length: float
  decode_steps: float
  microbatches: float
  chunks: int


class Plan(NamedTuple):
  """A compiled step, counted. Bytes and operations of one device."""

  config: Any  # With the number of micro-batches that was found.
  chip: Chip
  mesh: dict[str, int]
  expected: Expected
  lasting: dict[str, int]  # Kind -> bytes, between steps.
  temporary: dict[str, int]  # Kind -> bytes, while it runs.
  sizes: dict[str, int]  # `memory.of_step`.
  phases: list[roofline.Phase]
  unknown_loops: int  # Counted once.
  compile_s: float
  # Compiles held-out evaluation: the bytes that it needs, and those that the
  # run holds beside it; a ValueError if it does not fit.
  evaluate: Callable[[], tuple[int, int]]

  @property
  def seconds(self) -> float:
    """Of a step, at least."""
    return roofline.step_seconds(self.phases, self.chip)
