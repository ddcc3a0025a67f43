"""Records to tokens with a response-only loss mask."""

import hashlib
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from rsft_lib.artifact import file_hash, new_folder
from rsft_lib.chat import MODES, Encoded, encode
from rsft_lib.data.records import read_records, to_messages
from rsft_lib.data.store import StoreWriter
from rsft_lib.paths import existing, resolve
from rsft_lib.tokenizer import load_tokenizer


def tokenize(data: str | Path, tokenizer: str | Path, folder: str | Path, max_length: int = 16384) -> dict:
    """Write the records of a file as a token store.

    Args:
        max_length: most tokens of a sample; longer ones are dropped whole and counted, since a cut answer
            would teach to end without an end.

    Returns:
        The manifest's facts; `counts` has records, dropped, tokens, trained tokens and samples by mode.

    Raises:
        FileNotFoundError: the data file or the tokenizer is missing.
        ValueError: a record cannot be used (the message names file and line), or none fits.
    """
    data, destination = existing(data, "data file"), resolve(folder)
    loaded = load_tokenizer(tokenizer)
    counts = Counter(records=0, dropped=0, tokens=0, trained_tokens=0)
    modes = {loaded.convert_tokens_to_ids(token): mode for mode, token in MODES.items()}
    facts = {
        "made_by": "tokenize",
        "data": str(data),
        "data_sha256": file_hash(data),
        "tokenizer": str(resolve(tokenizer)),
        "tokenizer_sha256": file_hash(resolve(tokenizer) / "tokenizer.json"),
        "template_sha256": hashlib.sha256(loaded.chat_template.encode()).hexdigest(),
        "vocab_size": len(loaded),
        "max_length": max_length,
        "counts": counts,
    }
    with new_folder(destination, facts) as temporary:
        writer = StoreWriter(temporary)
        for place, record in tqdm(read_records(data), desc="tokenize", unit=" records", mininterval=1):
            encoded = _encode(loaded, record, place)
            counts["records"] += 1
            if len(encoded.ids) > max_length:
                counts["dropped"] += 1
                continue
            writer.add(encoded.ids, encoded.loss_mask)
            counts["tokens"] += len(encoded.ids)
            counts["trained_tokens"] += sum(encoded.loss_mask)
            counts[modes.get(encoded.ids[encoded.loss_mask.index(1)], "other")] += 1
        if counts["records"] == counts["dropped"]:
            raise ValueError(f"{data}: none of {counts['records']} records fits into max_length {max_length} tokens")
        writer.close()
    return facts


def _encode(tokenizer, record: dict, place: str) -> Encoded:
    try:
        return encode(tokenizer, to_messages(record, place))
    except ValueError as error:
        if str(error).startswith(place):
            raise
        raise ValueError(f"{place}: {error}") from error
