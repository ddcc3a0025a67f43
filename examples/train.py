"""The chain of the notebooks as a script: python examples/train.py MODEL DATA OUTPUT [EPOCHS]

MODEL is a Hugging Face folder or Hub name, DATA a file with `<think>` and `<short>` answers. For a real model raise
`seq_length` and `max_length` (see projects/) and give `train` the number of GPUs. For data in Qwen3's dialect
(questions that end with `/think` or `/no_think`) give `patch_tokenizer` and `tokenize` the argument `dialect="qwen3"`.
"""

import sys

from rsft_lib import TrainConfig, convert, export, generate, model_folder, patch_tokenizer, tokenize, train

if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    name, data, out, epochs = (*sys.argv[1:4], float((sys.argv[4:] or ["1"])[0]))
    model = model_folder(name)
    tokens = patch_tokenizer(model, f"{out}/tokenizer", {"<|quad_start|>": "<short>"})["vocab_size"]
    convert(model, f"{out}/megatron", tokens=tokens)
    tokenize(data, f"{out}/tokenizer", f"{out}/tokens", max_length=513)
    config = TrainConfig(
        checkpoint=f"{out}/megatron", data=f"{out}/tokens", output=f"{out}/run", epochs=epochs, seq_length=512,
        global_batch_size=8, lr=1e-3, precision="fp32",
    )  # fmt: skip
    if train(config, nproc=1) != "finished":
        sys.exit("stopped and saved; the same command resumes it")
    export(f"{out}/run", f"{out}/tokenizer", f"{out}/exported")
    print(generate(f"{out}/exported", ["What is 12 + 30?"], mode="think")[0].text)
