"""How it is measured: oracle and gate, clocks, peak memory, limits, and the CSV that keeps it."""
