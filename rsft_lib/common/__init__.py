"""What every folder needs: paths, whole folders with manifests, hashes, locks, limits, progress, models by name."""
