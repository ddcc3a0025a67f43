"""A running training: a dashboard that is updated in place, with a stop button."""
