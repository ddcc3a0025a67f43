"""What is tokenized for training and for evaluation, and where the tokens of each go."""

from pathlib import Path

from rsft_lib.common.artifact import MANIFEST
from rsft_lib.common.paths import ROOT, folder_name, resolve
from rsft_lib.data.records import SUFFIXES, source_of

SPLITS = ("train", "heldout")  # files of these names in a folder, as notebook 03 writes them


def splits_of(data: str | Path) -> dict[str, str | Path]:
    """The data of each split: a folder's files named after SPLITS; anything else that `source_of` takes is 'train'.

    Raises:
        FileNotFoundError: nothing is there, or a folder without training data.
        ValueError: it has two files for one split.
    """
    folder = resolve(data)
    if not folder.is_dir():
        source_of(data, "training data")
        return {"train": data}
    found = split_files(folder)
    for split, named in found.items():
        if len(named) > 1:
            raise ValueError(
                f"{folder} holds {' and '.join(path.name for path in named)} for {split}; keep one of them"
            )
    if found["train"]:
        return {split: named[0] for split, named in found.items() if named}
    if found["heldout"] or (folder / MANIFEST).is_file() or not any(folder.iterdir()):
        raise FileNotFoundError(
            f"{folder} holds no train.jsonl: run notebook 03_build_dataset, which writes it, or name a data file"
        )
    return {"train": data}


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The data files of each split in a folder, whatever their kind."""
    files = [path for path in sorted(folder.iterdir()) if any(suffix in SUFFIXES for suffix in path.suffixes)]
    return {split: [path for path in files if path.name.split(".")[0] == split] for split in SPLITS}


def token_folder(data: str | Path, split: str, tokenizer: str | Path, max_length: int, folder: str | Path = "") -> Path:
    """Where the tokens of a split go, named after data, tokenizer and length as the original of this kit names them.

    Args:
        folder: where to put it; empty for beside a data file, inside a folder, or, for a name on the Hub, under
            `assets/data`.
    """
    source = source_of(data)
    path, named = Path(source.name), source.split or split
    place = path.parent
    if source.split:
        place = path if path.is_dir() else ROOT / "assets" / "data" / folder_name(source.name)
    else:
        named = path.name
        while Path(named).suffix in (*SUFFIXES, ".gz", ".zst"):
            named = Path(named).stem
    return resolve(folder or place) / f"Tokenized-{named}-{Path(tokenizer).name}-{max_length}"
