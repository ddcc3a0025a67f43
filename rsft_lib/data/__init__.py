"""From records to packed batches: read, pair, tokenize, store, pack."""
