"""Prompts that the text tower would truncate are refused, by its tokenizer's exact count."""

import open_clip
import pytest
import torch
from torch import Tensor

from rft.clip.head import zero_shot_head
from rft.clip.load import TextTooLongError, load_clip, tokenize_all
from rft.config import ModelConfig
from tests import formats
from tests.formats import known_models  # noqa: F401


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.get_tokenizer("ViT-B-32")


# "cat" and "!!" are one token each; id 0, the padding, is also a token of text
@pytest.mark.parametrize("word", ["cat", "!!", "7"])
def test_the_longest_text_is_taken_and_one_more_token_is_not(tokenizer, word: str) -> None:
    longest = " ".join([word] * 75)
    texts = ["a dog", longest, ""]
    assert torch.equal(tokenize_all(tokenizer, texts), tokenizer(texts))
    with pytest.raises(TextTooLongError, match="longer than 77 tokens") as refused:
        tokenize_all(tokenizer, ["a dog", f"{longest} {word}"])
    assert (refused.value.text, refused.value.limit) == (f"{longest} {word}", 77)


@pytest.mark.parametrize("side", ["left", "both"])
def test_padding_in_front_and_a_last_token_of_its_own(side: str) -> None:
    def tokenizer(texts: list[str], context_length: int = 6) -> Tensor:
        rows = []
        for text in texts:
            ids = [1, *(len(word) + 10 for word in text.split())][: context_length - 1]
            padding = [0] * (context_length - 1 - len(ids))
            rows.append([*padding, *ids, 9] if side == "left" else [*ids, *padding, 9])
        return torch.tensor(rows)

    tokenize_all(tokenizer, ["a b c d", "a"])
    with pytest.raises(TextTooLongError):
        tokenize_all(tokenizer, ["a", "a b c d e"])


WORDS = "long name of a class that this tower does not read to its very end"


@pytest.mark.parametrize(
    ("classes", "templates", "named"),
    [
        (["cat", WORDS], ["a {c}."], f"class '{WORDS[:57]}...' .* with 'a {{c}}"),
        (["cat", "dog"], ["a {c}.", WORDS + " {c}"], "class 'cat' .* with 'long name"),
    ],
)
def test_a_head_names_the_class_whose_prompt_is_too_long(
    known_models,  # noqa: F811
    tmp_path,
    classes,
    templates,
    named,
) -> None:
    torch.save(formats.build_clip().state_dict(), tmp_path / "weights.pt")
    clip = load_clip(ModelConfig(clip=formats.NAME, pretrained=str(tmp_path / "weights.pt")))
    zero_shot_head(clip, ["cat", "dog"], ["a {c}."])
    with pytest.raises(ValueError, match=named) as refused:
        zero_shot_head(clip, classes, templates)
    assert "more than 12 tokens" in str(refused.value)


def test_a_word_tokenizer_refuses_too(tiny_clip) -> None:
    clip = load_clip(ModelConfig(clip=tiny_clip))
    with pytest.raises(ValueError, match="class 'red' makes a prompt of more than 8 tokens"):
        zero_shot_head(clip, ["red", "grey"], ["{c}" + " square" * 6])
