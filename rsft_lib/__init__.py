"""Supervised fine-tuning of reasoning models into hybrid ones, on megatron-core."""

import warnings

# megatron-core says on import, several times, that it goes on without these.
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|full scope is deprecated).*")
