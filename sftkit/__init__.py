"""Supervised fine-tuning of language models that you can see: in a notebook, a script, or a terminal."""
import importlib

__version__ = "0.1.0"
_HOMES = dict(Session="session", Run="session", train="session", compare="session", Recipe="recipe", SftkitError="recipe",
              sample_model="model", sample_data="rows")
__all__ = [*_HOMES]


def __getattr__(name):
    # modules load when one of their names is first used, so that `import sftkit` is quick
    if name not in _HOMES: raise AttributeError(f"module 'sftkit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sftkit.{_HOMES[name]}"), name)


def __dir__(): return sorted([*globals(), *_HOMES])
