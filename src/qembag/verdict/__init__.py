"""A verdict before a table is deployed: `compare`, and its report in words, as a plot and as a page."""
