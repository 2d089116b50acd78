"""Words against transformers' BERT: the word head, its loss, and which words may be hidden.

BERT's head puts a dense layer, GELU and a LayerNorm before the decoder; the paper's head is the
decoder alone, so those three are set to pass everything through. Whole-word masking, which the
collator offers too, is not part of VL-BEiT.
"""

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DataCollatorForLanguageModeling,
)
from transformers.modeling_outputs import BaseModelOutput

from foreign_files import bert_ids, worst, write_vocabulary
from tiny_models import fill_normal, masked_batch, tiny_model
from vlbeit.config import MaskingConfig, ObjectiveConfig
from vlbeit.data.streams import WordSettings, encode_text
from vlbeit.draws import Draws
from vlbeit.objectives import score_batch
from vlbeit.tokens.text import import_bert_vocab


class OurStates(torch.nn.Module):
    """Stands where BERT's trunk stands."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *_: object, **__: object) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.states)


def test_the_word_head_and_its_loss_are_those_of_bert() -> None:
    model, batch = tiny_model(), masked_batch("text", 2, lengths=(10, 7))
    config = model.config
    states = model.backbone(model.embed_text(batch.words_given, batch.word_valid))
    peer = BertForMaskedLM(
        BertConfig(vocab_size=config.vocab, hidden_size=config.width, num_hidden_layers=0,
                   num_attention_heads=4, tie_word_embeddings=False)
    )  # fmt: skip
    fill_normal(peer, seed=1)
    peer.bert, peer.cls.predictions.transform = OurStates(states), torch.nn.Identity()
    decoder, head = peer.cls.predictions.decoder, model.heads["mlm"]
    decoder.weight, decoder.bias = head.weight, head.bias
    labels = batch.words.masked_fill(~batch.word_masked, -100)
    with torch.no_grad():
        theirs = peer(batch.words_given, labels=labels)
        score = score_batch(model, batch, ObjectiveConfig())["mlm"]
        assert worst(head(states), theirs.logits) <= 1e-5
        assert worst(score.loss_sum / score.count, theirs.loss) <= 1e-5
        # The negative checks: another bias, and one label more.
        decoder.bias = torch.nn.Parameter(head.bias.roll(1))
        assert worst(head(states), peer(batch.words_given).logits) > 1e-3
        decoder.bias, labels[0, 0] = head.bias, 7
        assert worst(score.loss_sum / score.count, peer(batch.words_given, labels=labels).loss) > (
            1e-3
        )


def test_words_that_may_be_hidden_are_those_of_transformers_collator(tmp_path) -> None:
    path = write_vocabulary(tmp_path)
    ours, theirs = import_bert_vocab(path), BertTokenizer(str(path))
    texts = ["w1 w3 w20", "w5", "w0 nothing w24 w7 w7"]  # "nothing" is not in the vocabulary
    collator = DataCollatorForLanguageModeling(
        theirs, mlm_probability=1.0, mask_replace_prob=1.0, random_replace_prob=0.0
    )
    batch = collator([theirs(text) for text in texts])
    settings = WordSettings(
        vocab_size=ours.size, rate=1.0, masking=MaskingConfig(to_mask=1.0, to_random=0.0)
    )
    assert len(texts) == len(batch["labels"])
    for row, text in enumerate(texts):
        words = encode_text(ours, text, 12)
        given, masked = settings.masked(words, Draws("all", row))
        real = batch["attention_mask"][row].bool()
        labels = batch["labels"][row][real]
        assert torch.equal(bert_ids(torch.from_numpy(given).long()), batch["input_ids"][row][real])
        assert torch.equal(torch.from_numpy(masked), labels != -100)
        assert torch.equal(bert_ids(torch.from_numpy(words[masked]).long()), labels[labels != -100])
        assert (batch["labels"][row][~real] == -100).all()
    # The negative check: with [UNK] among the words to hide the two would differ.
    with_unknown = torch.from_numpy((words >= 5) | (words == 1))
    assert not torch.equal(with_unknown, labels != -100)
    assert masked.sum() == 4 and (words == 1).sum() == 1
