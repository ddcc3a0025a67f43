"""Shared utilities: paths, atomic folders with manifests, hashes, locks, resource limits, progress bars."""
