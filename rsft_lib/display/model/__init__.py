"""A model: its template, embedding norms, manifest, verification and answers."""
