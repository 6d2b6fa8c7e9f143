"""Names, options and configs of factories."""

import pytest

from dppo_jax import registry

register = registry.Registry('dish')


@register
def soup(*, litres: float = 0.5, bowls: int = 2, salt: float | None = None):
  return litres, bowls, salt


@register
def salad(*, guests: int):
  return guests


def test_names_are_sorted():
  assert register.names() == ['salad', 'soup']


def test_build_calls_the_factory_with_its_options():
  assert register.build('soup') == (0.5, 2, None)
  assert register.build('soup', bowls=3, salt=1.0) == (0.5, 3, 1.0)


def test_unknown_name_is_refused_with_the_nearest_and_all():
  with pytest.raises(ValueError) as error:
    register.build('soop')
  assert str(error.value) == (
      "Unknown dish 'soop'. Did you mean 'soup'? Known: salad, soup."
  )


def test_nothing_is_suggested_where_nothing_is_near():
  with pytest.raises(ValueError) as error:
    register.config('xyz')
  assert str(error.value) == "Unknown dish 'xyz'. Known: salad, soup."


def test_unknown_option_is_refused_with_the_nearest():
  with pytest.raises(ValueError, match="'bowl'.*Did you mean 'bowls'"):
    register.build('soup', bowl=3)


def test_options_are_the_defaults_of_the_signature():
  assert register.options('soup') == {'litres': 0.5, 'bowls': 2, 'salt': None}
  assert not register.options('salad')  # `guests` has no default.


def test_config_holds_every_option_and_builds_what_it_says():
  config = register.config('soup', bowls=4)
  assert config.to_dict() == {
      'name': 'soup', 'litres': 0.5, 'bowls': 4, 'salt': None
  }
  assert register.build(**config) == (0.5, 4, None)


def test_config_refuses_a_typo_with_the_nearest():
  config = register.config('soup')
  with pytest.raises(AttributeError, match='Did you mean.*bowls'):
    config.bowl = 3
  with pytest.raises(KeyError):
    register.config('soup', bowl=3)


def test_a_default_that_is_a_whole_number_may_be_a_float_by_its_annotation():
  menu = registry.Registry('dish')

  @menu
  def broth(*, litres: float = 1, bowls: int = 2):
    return litres, bowls

  config = menu.config('broth')
  config.litres = 0.5
  with pytest.raises(TypeError):
    config.bowls = 0.5
  assert menu.build(**config) == (0.5, 2) and broth() == (1, 2)


def test_an_option_that_nobody_can_set_is_named_with_its_module():
  with pytest.raises(ValueError, match="dish 'salad' has options without a "
                     f'default: guests. Give each one in {__name__}'):
    register.build('salad')


def test_a_name_of_the_package_is_not_taken_by_another_module():
  menu = registry.Registry('dish')
  ours = lambda: 0
  ours.__name__, ours.__module__ = 'ice', 'dppo_jax.dishes'
  menu(ours)
  menu(ours)  # A module that is read again.

  def ice():
    return 1

  with pytest.raises(ValueError, match=f"{__name__} registers a dish 'ice', "
                     'which dppo_jax.dishes has; give it another name'):
    menu(ice)
  assert menu.build('ice') == 0


def test_a_name_whose_words_are_there_in_another_order_is_suggested():
  message = registry.unknown('row', 'tv_topk', ['dppo_topk_tv', 'grpo'])
  assert "Did you mean 'dppo_topk_tv'?" in message


def test_config_knows_the_type_of_an_option_that_is_none():
  config = register.config('soup')
  config.salt = 2.5
  assert config.salt == 2.5
  with pytest.raises(TypeError):
    config.salt = 'a pinch'


def test_what_is_noted_of_a_factory_is_told_to_who_asks():
  menu = registry.Registry('dish')

  @menu.with_facts(hot=True)
  def stew(*, bowls: int = 1):
    return bowls

  @menu
  def ice():
    return 0

  assert menu.fact('stew', 'hot') is True
  assert menu.fact('ice', 'hot') is None
  with pytest.raises(ValueError, match="Unknown fact of a dish 'hto'. Did you"):
    menu.fact('stew', 'hto')
  assert menu.build('stew') == stew() == 1 and ice() == 0
  with pytest.raises(ValueError, match="Unknown dish 'stwe'. Did you mean"):
    menu.fact('stwe', 'hot')
