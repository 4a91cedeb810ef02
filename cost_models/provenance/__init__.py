"""Where the numbers of a plan come from: measured, interpolated, analytic."""
