"""The settings of tokenizing."""

from dataclasses import dataclass, field

from rsft_lib.tokenizer.dialect import THINKLESS, Dialect, dialect_of


@dataclass(frozen=True, kw_only=True)
class Options:
    """The settings that determine the tokens of a record, besides tokenizer and template."""

    max_length: int = 16384
    """Maximum number of tokens of a sample."""
    overlong: str = "drop"
    """Drop longer samples ('drop'), truncate them without an EOS ('truncate'), or raise an error ('error')."""
    turns: str = "all"
    """Train every answer of a conversation ('all') or only the last one ('last')."""
    control_tokens: str = "reject"
    """Reject records whose text contains a control token ('reject'), or encode it as the token ('allow')."""
    columns: dict[str, str] = field(default_factory=dict)
    """Field -> its name in the dataset, e.g. {'prompt': 'question', 'response': 'answer'}."""
    dialect: str = THINKLESS.name
    """How the data asks for a mode and answers in it, see `tokenizer.dialect`."""
    empty_block: str = "trained"
    """Train the empty think block of an answer without thoughts ('trained'), or leave it out of the loss ('masked').

    A model that is asked by `/no_think` writes the block itself. If it is masked, nothing teaches the model to begin
    such an answer, and it may write thoughts without end (https://github.com/modelscope/ms-swift/issues/5927, and the
    question of issue 10022). 'masked' is for a model that is always served with the block in the prompt
    (`enable_thinking=False`), or for data without switches, where a trained block would teach it never to think
    (https://github.com/snowflakedb/ArcticTraining/pull/286).
    """

    def __post_init__(self):
        self.forms  # noqa: B018  # raises if the names are unknown
        choices = {"overlong": ("drop", "truncate", "error"), "turns": ("all", "last"),
                   "control_tokens": ("reject", "allow")}  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; it must be at least 2")

    @property
    def forms(self) -> Dialect:
        """The dialect, with its empty think block masked or trained."""
        return dialect_of({"dialect": self.dialect, "empty_block": self.empty_block})
