"""Held-out questions that a model answers while it is trained, in each mode and by its own choice.

The weights are written and exported to a temporary folder as at the end of a run, and every rank answers its share of
the questions with transformers. So any layout can answer, and with the tokens that the exported model would write.
"""

import shutil
from itertools import islice
from pathlib import Path

import torch

from rsft_lib.checkpoint.export import export_unfinished
from rsft_lib.common.paths import require_path
from rsft_lib.common.progress import without_bars
from rsft_lib.data.store import TokenStore
from rsft_lib.generation.answer import Answer, chosen_mode, count_correct, score
from rsft_lib.generation.answer_files import NAMES, remove_later, write_answers
from rsft_lib.generation.generate import open_speaker
from rsft_lib.generation.inference_engines import Sampling
from rsft_lib.generation.intervals import wilson
from rsft_lib.generation.questions import held_out_questions, modes_asked, room_for_answers
from rsft_lib.tokenizer.dialect import MODES
from rsft_lib.tokenizer.patch import load_tokenizer
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.saving import write_weights
from rsft_lib.training.state import TrainState
from rsft_lib.training.watchdog import deadline

TEMPORARY = ".answers.tmp"
BATCHES = (256, 32)  # prompts in a batch, and where the memory does not suffice
OUT_OF_MEMORY = (
    "held-out questions were not answered, for the memory did not suffice beside the training: lower "
    "eval_max_new_tokens or eval_question_count"
)
Answers = dict[str | None, list[Answer]]


class LiveAnswers:
    """Asks the same questions whenever it is called; collective over all ranks."""

    def __init__(self, config: TrainConfig, store: TokenStore, output: Path, model_config: Path, iteration: int):
        """Read the questions, and remove answers after step `iteration`, at which the run starts or resumes.

        Args:
            store: the held-out data, or else the training data.
            model_config: `config.json` of the model.

        Raises:
            FileNotFoundError: the questions, or the tokenizer of the data, are missing.
            ValueError: there are no questions, or a record is invalid.
        """
        path = require_path(config.eval_questions or store.manifest.get("data", ""), "eval_questions")
        self.tokenizer = require_path(store.manifest.get("tokenizer", ""), "tokenizer of the data")
        self.dialect = store.dialect
        self.questions = held_out_questions(path, config.eval_question_count, self.dialect)
        self.modes = modes_asked(path)
        limit = config.eval_max_new_tokens or room_for_answers(path, load_tokenizer(self.tokenizer))
        self.sampling = Sampling(limit)
        self.output, self.model_config, self.timeout = output, model_config, config.save_timeout
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(output / TEMPORARY, ignore_errors=True)  # of a run that was killed
            remove_later(output, iteration)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Metrics of the answers: accuracy, form and length in each mode, and the share of answers with thoughts."""
        folder, first = self.output / TEMPORARY, torch.distributed.get_rank() == 0
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with deadline(self.timeout), torch.random.fork_rng(devices), without_bars():
            try:
                self._export(state, folder, first)
                answers = self._gathered(self._answer(folder / "exported"))
            finally:
                if first:
                    shutil.rmtree(folder, ignore_errors=True)
        if not answers:
            if first:
                print(f"step {state.iteration}: {OUT_OF_MEMORY}", flush=True)
            return {}
        if first:
            write_answers(self.output, state.iteration, self.questions, answers)
        return metrics(answers, [question.expected for question in self.questions])

    def _export(self, state: TrainState, folder: Path, first: bool) -> None:
        if first:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "exported").mkdir(parents=True)
        torch.distributed.barrier()
        write_weights(state, folder)
        if first:
            shutil.copyfile(self.model_config, folder / "config.json")
            export_unfinished(folder, self.tokenizer, folder / "exported")
        torch.distributed.barrier()

    def _answer(self, model: Path) -> Answers:
        """The answers to this rank's share of the questions; empty if its memory does not suffice."""
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        own = self.questions[rank::ranks]
        if not own:
            return {mode: [] for mode in self.modes}
        for batch_size in BATCHES:
            try:
                speaker = open_speaker(model, "transformers", batch_size, self.dialect)
                # A batch takes as long as its longest answer, so the modes share one.
                asked = [(question, mode) for mode in self.modes for question in own]
                answers = iter(speaker.answers(asked, self.sampling))
                return {mode: list(islice(answers, len(own))) for mode in self.modes}
            except torch.OutOfMemoryError:
                speaker = None
            finally:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()  # of the model that answered
        return {}

    def _gathered(self, own: Answers) -> Answers:
        """The answers of all ranks in the order of the questions; empty if they are for any rank."""
        ranks = torch.distributed.get_world_size()
        parts: list[Answers] = [{}] * ranks
        torch.distributed.all_gather_object(parts, own)  # also, all have read the exported model
        if not all(parts):
            return {}
        numbers = range(len(self.questions))
        return {mode: [parts[number % ranks][mode][number // ranks] for number in numbers] for mode in self.modes}


def metrics(answers: Answers, expected: list[str | None]) -> dict[str, float]:
    """`generate.score` in each mode, as `think_accuracy` etc., with the bounds of accuracy's 95 % interval (Wilson) as
    `think_accuracy_low` and `_high`; the shares of modes by own choice, `choice_thinks` and `choice_shorts`; and
    `questions` with a known answer."""
    found: dict[str, float] = {"questions": sum(one is not None for one in expected)}
    for name, mode in NAMES.items():
        if given := answers.get(mode):
            found |= {f"{name}_{metric}": value for metric, value in score(given, expected, mode).items()}
            low, high = wilson(*count_correct(given, expected))
            found |= {f"{name}_accuracy_low": low, f"{name}_accuracy_high": high} if found["questions"] else {}
    if free := answers.get(None):
        for chosen in MODES:
            found[f"choice_{chosen}s"] = sum(chosen_mode(answer) == chosen for answer in free) / len(free)
    return found
