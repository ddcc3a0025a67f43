"""Settings that suit a model, to begin from: `TrainConfig(**PRESETS["r1-1.5b"], checkpoint=..., data=..., output=...)`.

What a preset does not name has the default of `TrainConfig`, which is the original's. Numbers of GPUs are the fewest
with 80 GB on which the preset fits at 16,384 tokens; more of them are data-parallel replicas.
"""

_TINY = {
    "seq_length": 512, "global_batch_size": 4, "lr": 2e-3, "min_lr": 2e-4, "precision": "fp32",
    "eval_interval": 50, "eval_iters": 4,
}  # fmt: skip

PRESETS: dict[str, dict] = {
    "tiny": _TINY,  # the model of rsft_lib.demo, on a laptop's CPU
    "r1-1.5b": {},  # 1 GPU: 52 GiB
    "r1-1.5b-saving": {"recompute": "selective", "moments": "bf16"},  # 1 GPU: 30 GiB
    "r1-1.5b-smallest": {"recompute": "full", "moments": "bf16", "gradients": "bf16"},  # 1 GPU: 22 GiB, a 24 GB card
    "r1-7b": {"tensor_parallel": 2, "sequence_parallel": True, "recompute": "selective"},  # 4 GPUs
    "r1-14b": {"tensor_parallel": 4, "sequence_parallel": True, "recompute": "selective"},  # 8 GPUs
    "r1-32b": {
        "tensor_parallel": 8, "sequence_parallel": True, "pipeline_parallel": 2, "recompute": "selective",
    },  # 16 GPUs
}  # fmt: skip
