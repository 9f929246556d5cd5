"""Judging a quantized table before deploying it: `compare`, and its report as text, as a plot and as a page."""
