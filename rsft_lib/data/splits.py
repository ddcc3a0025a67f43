"""Training and held-out splits: their data files, and the folders of their tokens."""

from pathlib import Path

from rsft_lib.common.artifact import MANIFEST
from rsft_lib.common.paths import folder_name, resolve
from rsft_lib.data.records import SUFFIXES, source_of

SPLITS = ("train", "heldout")  # file names without suffix, as notebook 03 writes them


def splits_of(data: str | Path) -> dict[str, str | Path]:
    """The data of each split: the files of a folder named after SPLITS; any other source is 'train'.

    Raises:
        FileNotFoundError: `data` does not exist, or is a folder without training data.
        ValueError: the folder has two files for one split.
    """
    folder = resolve(data)
    if not folder.is_dir():
        source_of(data, "training data")
        return {"train": data}
    files = split_files(folder)
    for split, paths in files.items():
        if len(paths) > 1:
            raise ValueError(
                f"{folder} contains {' and '.join(path.name for path in paths)} for {split}; keep one of them"
            )
    if files["train"]:
        return {split: paths[0] for split, paths in files.items() if paths}
    if files["heldout"] or (folder / MANIFEST).is_file() or not any(folder.iterdir()):
        raise FileNotFoundError(
            f"{folder} has no train.jsonl: run notebook 03_build_dataset, which writes it, or give a data file"
        )
    return {"train": data}


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The data files of each split in a folder, whatever their kind."""
    files = [path for path in sorted(folder.iterdir()) if any(suffix in SUFFIXES for suffix in path.suffixes)]
    return {split: [path for path in files if path.name.split(".")[0] == split] for split in SPLITS}


def token_folder(data: str | Path, split: str, tokenizer: str | Path, max_length: int, folder: str | Path = "") -> Path:
    """The folder for the tokens of a split, named after data, tokenizer and length as in the original of this kit.

    Args:
        folder: its parent; by default the folder of a data file, a dataset's own folder, or, for a dataset on the Hub,
            a folder under `assets/data`.
    """
    source = source_of(data)
    path, stem = Path(source.name), source.split or split
    parent = path.parent
    if source.split:
        parent = path if path.is_dir() else Path("assets") / "data" / folder_name(source.name)
    else:
        stem = path.name
        while Path(stem).suffix in (*SUFFIXES, ".gz", ".zst"):
            stem = Path(stem).stem
    return resolve(folder or parent) / f"Tokenized-{stem}-{Path(tokenizer).name}-{max_length}"
