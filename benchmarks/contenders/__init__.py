"""Who computes it: every way from packed rows to packed rows that is timed, in one registry."""
