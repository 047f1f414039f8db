"""Drawn inputs against everything that takes some: operator, modules, readers, C++ operators.

``make fuzz MINUTES=30`` draws new ones (``fuzz.run``); the ordinary tests run a fixed part of the
same properties. What was found stands in ``tests/LEDGER.md``.
"""
