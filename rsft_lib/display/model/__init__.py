"""A model: chat template, embedding norms, manifest, verification and answers."""
