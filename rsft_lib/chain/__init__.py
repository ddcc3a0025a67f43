"""The notebooks as a chain: their parameters, project files, what each takes from those before it, and a report."""
