"""Tables and plots for notebooks, one folder per topic."""
