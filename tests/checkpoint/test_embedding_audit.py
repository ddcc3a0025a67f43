"""The audit of embedding rows compared with numpy on whole matrices."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from rsft_lib import demo
from rsft_lib.checkpoint import embedding_audit
from rsft_lib.checkpoint.embedding_audit import INPUT, OUTPUT, audit, row_means
from rsft_lib.checkpoint.lazy_weights import Weights
from rsft_lib.display.model.embedding_norms import plot_audit
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer

TOKENS = ["<short>", "<think>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    demo.make_model(folder / "model", seed=0)
    patch_tokenizer(folder / "model", folder / "patched", {"<|quad_start|>": "<short>"})
    return load_tokenizer(folder / "patched")


def make(folder, tied: bool, shard: str, dtype=torch.bfloat16) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=512, num_key_value_heads=1, tie_word_embeddings=tied, **shape)
    model = Qwen2ForCausalLM(config).to(dtype)
    with torch.no_grad():  # rows of all lengths
        for parameter in {model.model.embed_tokens.weight, model.lm_head.weight}:
            parameter *= torch.rand(512, 1).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def expected(
    weight: torch.Tensor, number: int, count: int, nearest: int
) -> tuple[float, float, list[int], list[float]]:
    rows = weight.detach().double().numpy()[:count]
    norms = np.sqrt((rows**2).sum(1))
    cosine = rows @ rows[number] / norms / norms[number]
    order = [int(i) for i in np.argsort(-cosine) if i != number][:nearest]
    below = np.mean([norms[i] < norms[number] for i in range(count) if i != number])
    return norms[number], 100 * below, order, [cosine[i] for i in order]


def as_bin(folder):
    """The same weights as `.bin` files."""
    index = folder / "model.safetensors.index.json"
    for path in folder.glob("*.safetensors"):
        torch.save(load_file(path), folder / path.name.replace("model", "pytorch_model").replace("safetensors", "bin"))
        path.unlink()
    if index.exists():
        text = index.read_text().replace("model-0", "pytorch_model-0").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "50KB"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_norms_percentiles_and_neighbours_are_those_of_the_whole_matrix(
    tokenizer, tmp_path, monkeypatch, tied, shard, kind
):
    model = make(tmp_path / "model", tied, shard)
    assert (tmp_path / "model" / "model.safetensors.index.json").exists() == (shard == "50KB")
    if kind == "bin":
        as_bin(tmp_path / "model")
    monkeypatch.setattr(embedding_audit, "ROWS", 100)  # so that the last block is incomplete
    pieces, read = [], Weights.read
    monkeypatch.setattr(Weights, "read", lambda *given: pieces.append(len(found := read(*given))) or found)
    found = audit(tmp_path / "model", tokenizer, TOKENS, nearest=5)
    assert max(pieces) == 100 and sum(pieces) == (1 if tied else 2) * (len(tokenizer) + len(TOKENS))
    weights = {"input": model.model.embed_tokens.weight, "output": model.lm_head.weight}
    weights = {"tied": weights["input"]} if tied else weights
    assert [(row.token, row.embedding) for row in found.rows] == [(t, name) for name in weights for t in TOKENS]
    for row in found.rows:
        number, count = tokenizer.convert_tokens_to_ids(row.token), len(tokenizer)
        norm, percentile, near, cosines = expected(weights[row.embedding], number, count, 5)
        assert row.norm == pytest.approx(norm, rel=1e-5) and row.percentile == pytest.approx(percentile)
        assert [token for token, _ in row.nearest] == [embedding_audit._shown(tokenizer, i) for i in near]
        assert [cosine for _, cosine in row.nearest] == pytest.approx(cosines, abs=1e-5)
        assert len(found.norms[row.embedding]) == count < 512, "rows without a token are left out"


def test_the_audit_shows_itself_as_a_table_and_as_a_picture(tokenizer, tmp_path):
    make(tmp_path / "model", False, "1GB")
    found = audit(tmp_path / "model", tokenizer, TOKENS)
    lines = repr(found).splitlines()
    assert len(lines) == 5 and lines[1].startswith("<short>      input") and "&lt;short&gt;" in found._repr_html_()
    figure = plot_audit(found)
    titles = [f"{name} embedding, {len(tokenizer)} tokens" for name in ("input", "output")]
    assert [axes.get_title() for axes in figure.axes] == titles
    assert [text.get_text().split()[0] for text in figure.axes[0].get_legend().get_texts()] == TOKENS


def test_a_row_of_zeros_is_no_neighbour_and_has_none(tokenizer, tmp_path):
    weight = torch.eye(512, 64)
    weight[tokenizer.convert_tokens_to_ids("<short>")] = 0
    save_file({INPUT: weight, OUTPUT: weight.clone()}, tmp_path / "model.safetensors")
    row, *_ = audit(tmp_path, tokenizer, ["<short>"]).rows
    assert row.norm == row.percentile == 0 and all(cosine == 0 for _, cosine in row.nearest)


def test_a_model_that_cannot_be_audited_is_refused_with_a_reason(tokenizer, tmp_path):
    assert repr(audit(tmp_path, tokenizer, TOKENS)) == "the folder has no weights: no embedding rows to compare"
    save_file({"lm_head.weight": torch.zeros(4, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has no tensor 'model.embed_tokens.weight'"):
        audit(tmp_path, tokenizer, TOKENS)
    save_file({INPUT: torch.zeros(4, 2)}, tmp_path / "model.safetensors")
    found = audit(tmp_path, tokenizer, TOKENS)
    assert found.without_row == tuple(TOKENS) and not found.rows and "has no row yet" in repr(found)
    with pytest.raises(ValueError, match="'<none>' has .* token ids .*expected one"):
        audit(tmp_path, tokenizer, ["<none>"])
    index = {"weight_map": {INPUT: "gone.safetensors", "model.norm.weight": "needless.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(audit(tmp_path, tokenizer, TOKENS).norms["tied"]) == 4  # the whole file, which transformers would read
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="gone.safetensors is missing but listed in the index"):
        audit(tmp_path, tokenizer, TOKENS)
    save_file({"other": torch.zeros(1)}, tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match=f"{INPUT}: not in gone.safetensors, despite the index"):
        audit(tmp_path, tokenizer, TOKENS)


def test_row_means_are_the_ids_of_words_as_they_stand_in_a_sentence(tokenizer):
    ids = tokenizer.convert_tokens_to_ids
    means = row_means(tokenizer, {"<short>": ["four", " eggs "], "<think>": ["step"]})
    assert means[ids("<short>")] == [ids("Ġfour"), ids("Ġeggs")]
    assert tokenizer.decode(means[ids("<think>")]) == " step" and len(means) == 2
    for words, message in (({"<short>": []}, "must be initialised from words"), ({"<none>": ["a"]}, "expected one")):
        with pytest.raises(ValueError, match=message):
            row_means(tokenizer, words)
