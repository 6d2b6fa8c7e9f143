"""Names for factories: a factory's keyword arguments are its config.

A module makes one `Registry`, decorates its factories with it, and exposes its
`build`, `names` and `config`. Strings stop there: what `build` returns is a
plain function or tuple of functions.
"""

from collections.abc import Callable
import difflib
import inspect
import types
import typing
from typing import Any


def unknown(kind: str, name: Any, known) -> str:
  """One line that names the culprit, the nearest match and all choices."""
  known = sorted(known)
  close = difflib.get_close_matches(str(name), known, n=1)
  words = set(str(name).split('_'))
  close += [x for x in known if words <= set(str(x).split('_'))]
  hint = f' Did you mean {close[0]!r}?' if close else ''
  return f'Unknown {kind} {name!r}.{hint} Known: {", ".join(known)}.'


class Registry:
  """Named factories of one kind, for example 'divergence'."""

  def __init__(self, kind: str):
    self._kind = kind
    self._factories: dict[str, Callable[..., Any]] = {}
    self._facts: dict[str, dict[str, Any]] = {}

  def __call__(self, factory: Callable[..., Any]) -> Callable[..., Any]:
    """Registers `factory` under its own name; a decorator.

    Raises:
      ValueError: the package has one of this name, from another module.
    """
    name, module = factory.__name__, factory.__module__
    known = self._factories.get(name, factory).__module__
    if known.startswith('dppo_jax.') and module != known:
      raise ValueError(
          f'{module} registers a {self._kind} {name!r}, which {known} has; '
          'give it another name.'
      )
    self._factories[name] = factory
    return factory

  def with_facts(self, **facts: Any) -> Callable[..., Any]:
    """A decorator that registers, and notes what others may ask of a factory.

    So that it is said where the factory is, and not in a list of who asks.
    """

    def register(factory):
      self._facts[factory.__name__] = facts
      return self(factory)

    return register

  def fact(self, name: str, fact: str) -> Any:
    """What was noted of the factory called `name`; None if nothing was.

    Raises:
      ValueError: there is no such factory, or none of which this is noted.
    """
    self.factory(name)
    known = {x for facts in self._facts.values() for x in facts}
    if fact not in known:
      raise ValueError(unknown(f'fact of a {self._kind}', fact, known))
    return self._facts.get(name, {}).get(fact)

  def names(self) -> list[str]:
    """All registered names, sorted."""
    return sorted(self._factories)

  def factory(self, name: str) -> Callable[..., Any]:
    """The factory called `name`, or a ValueError that suggests one."""
    if name not in self._factories:
      raise ValueError(unknown(self._kind, name, self._factories))
    return self._factories[name]

  def options(self, name: str) -> dict[str, Any]:
    """Option names and defaults of a factory, from its signature."""
    parameters = inspect.signature(self.factory(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}

  def required(self, name: str) -> list[str]:
    """Options without a default: what only the caller can know."""
    parameters = inspect.signature(self.factory(name)).parameters.values()
    return [p.name for p in parameters if p.default is p.empty]

  def build(self, name: str, **options) -> Any:
    """Calls the factory `name`, refusing options that it does not have."""
    factory = self.factory(name)
    known = inspect.signature(factory).parameters
    for option in options:
      if option not in known:
        kind = f'option of {self._kind} {name!r}:'
        raise ValueError(unknown(kind, option, known))
    if missing := [x for x in self.required(name) if x not in options]:
      raise ValueError(
          f'The {self._kind} {name!r} has options without a default: '
          f'{", ".join(missing)}. Give each one in {factory.__module__}.'
      )
    return factory(**options)

  def config(self, name: str, **overrides):
    """`name` and every option as a ConfigDict, so each is printed and settable.

    An option whose default is None becomes a typed placeholder, because flags
    cannot guess the type of None.
    """
    # Only configs need it, and the mathematics must import without it.
    import ml_collections

    hints = typing.get_type_hints(self.factory(name))
    config = ml_collections.ConfigDict({'name': name})
    for option, default in self.options(name).items():
      if default is None:
        default = ml_collections.config_dict.placeholder(
            _type_but_none(hints[option])
        )
      elif _type_but_none(hints.get(option)) is float:
        default = float(default)  # A field of a config has its default's type.
      config[option] = default
    config.lock()
    config.update(overrides)
    return config


def _type_but_none(hint) -> type:
  """`float` for `float | None`."""
  if typing.get_origin(hint) not in (typing.Union, types.UnionType):
    return hint
  return next(t for t in typing.get_args(hint) if t is not type(None))
