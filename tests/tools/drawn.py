"""Property tests on drawn examples, once for the ordinary tests and for ``make fuzz``.

``@drawn(40, x=strategy)`` makes a test of 40 fixed examples, of others with each --seed-shift; its
attribute ``again(seed, count)`` runs other ones, which the same seed draws anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from . import seeds


def drawn(count: int, **strategies: Any) -> Callable[[Callable], Callable]:
    """Decorates a property; its other arguments are fixtures of pytest, or go to ``again``."""

    def decorate(test: Callable) -> Callable:
        found = _made(test, strategies, count, seeds.shift())

        def again(number: int, most: int, watch: Callable[..., None] | None = None, **fixtures):
            """Runs ``most`` examples; watch: called with each of them before it runs."""

            def watched(**arguments):
                if watch is not None:
                    watch(**{name: arguments[name] for name in strategies})
                test(**arguments, **fixtures)

            watched.__name__ = watched.__qualname__ = test.__name__
            watched.__module__ = test.__module__
            _made(watched, strategies, most, number)()

        found.again = again  # type: ignore[attr-defined]
        return found

    return decorate


def _made(test: Callable, strategies: dict[str, Any], count: int, number: int) -> Callable:
    with_settings = settings(
        max_examples=count,
        derandomize=not number,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )(given(**strategies)(test))
    return seed(number)(with_settings) if number else with_settings
