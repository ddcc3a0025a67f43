"""How the model computes, as far as predictions of memory and time have to know it: free of megatron-core."""

CHUNK = 3072  # maximum rows of logits in memory at once: 0.9 GB for 151,936 tokens in bf16
LESS = {"full": "selective", "selective": None}  # recomputation in some layers -> in the others


def heads_of_rank(heads: int, groups: int, ranks: int) -> tuple[int, int]:
    """Heads, and groups of keys and values, on each of `ranks` context-parallel ranks.

    If heads are not divisible by ranks, they are padded. If ranks are more than groups, each group is on several of
    them; if groups cannot be divided, each head has a copy of its group.

    >>> [heads_of_rank(28, 4, ranks) for ranks in (2, 4, 8)], heads_of_rank(12, 2, 4)
    ([(14, 2), (7, 1), (4, 4)], (3, 1))
    """
    own = -(-heads // ranks)
    if heads % ranks or (groups % ranks and ranks % groups):
        return own, own
    return own, max(1, groups // ranks)
