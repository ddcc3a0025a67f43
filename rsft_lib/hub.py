"""Models by name: a folder that is there, the demo's tiny model, or a download from the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import snapshot_download

from rsft_lib.paths import ROOT, folder_name, resolve

CHECKPOINTS = ROOT / "assets" / "checkpoints"
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]  # no code, no pickled weights


def model_folder(name: str, revision: str = "main") -> Path:
    """The folder of a Hugging Face model, downloaded to `assets/checkpoints/<org_name>` if need be.

    Args:
        name: a folder (relative ones start at the project root), or a name on the Hub such as
            'deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B'.
        revision: branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: there is no such folder, and no such name can be had from the Hub.
    """
    if resolve(name).is_dir():
        return resolve(name)
    folder = CHECKPOINTS / folder_name(name)
    try:
        snapshot_download(name, revision=revision, local_dir=folder, allow_patterns=FILES)
    except Exception as error:  # the library raises many kinds; each means that the model is not here
        raise FileNotFoundError(
            f"{name!r} is no folder under {ROOT} and could not be downloaded from the Hub ({error}); "
            "check the name and the network, and set HF_TOKEN for a model that asks for it"
        ) from error
    return folder
