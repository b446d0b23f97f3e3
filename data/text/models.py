"""RoBERTa and Flan-T5 as towers: token ids and a mask in, features out. Loading `transformers` takes seconds."""

from collections import OrderedDict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel, T5Config, T5ForConditionalGeneration
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead

from data.files import InputError
from data.paper.hub import refuse_unusable, refusing

State = dict[str, Tensor]


class FirstToken(nn.Module):
    """A RobertaModel's last state of the first token: (B, N), (B, N) -> (B, D)."""

    def __init__(self, encoder: RobertaModel):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]


class Answering(nn.Module):
    """A T5's logits of the answer's first token: (B, N), (B, N) -> (B, V). `whole`: all of it, (B, 10) at most."""

    def __init__(self, t5: T5ForConditionalGeneration):
        super().__init__()
        self.t5 = t5

    def forward(self, input_ids: Tensor, attention_mask: Tensor, whole: bool = False) -> Tensor:
        texts = {"input_ids": input_ids, "attention_mask": attention_mask}
        if whole:
            # Without a cache, which layers that run sample by sample cannot share; answers are a word or two.
            return self.t5.generate(**texts, max_length=10, do_sample=False, num_beams=1, use_cache=False)
        start = input_ids.new_full((len(input_ids), 1), self.t5.config.decoder_start_token_id)
        return self.t5(**texts, decoder_input_ids=start, use_cache=False).logits[:, 0]


class FirstAnswers(nn.Module):
    """Of logits (B, V), those of the tokens with which a task's answers begin (B, C)."""

    def __init__(self, tokens: list[int]):
        super().__init__()
        self.register_buffer("tokens", torch.tensor(tokens))

    def forward(self, logits: Tensor) -> Tensor:
        return logits[:, self.tokens]


def mean_state(encoder: nn.Module, batch: dict) -> Tensor:
    """The mean of an encoder's last states over the tokens that the mask leaves, (B, D): what Twin-Merging sees."""
    mask = batch["attention_mask"]
    states = encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state  # (B, N, D)
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def roberta(config: dict, state: State, source: Path) -> FirstToken:
    """The encoder of a RoBERTa, whatever its head. Raises InputError, naming the entry, for weights that do not fit.

    The two linear layers of an MLP, which lie apart in transformers, become one module `mlp`: what is to be routed.
    """
    encoder = RobertaModel(RobertaConfig.from_dict(config), add_pooling_layer=False)
    load(encoder, state, source, prefix="roberta.", unused=("pooler.", "embeddings.position_ids"))
    for layer in encoder.encoder.layer:
        mlp = nn.Sequential(layer.intermediate, layer.output.dense)
        layer.intermediate, layer.output.dense = nn.Sequential(OrderedDict(mlp=mlp)), nn.Identity()
    return FirstToken(encoder).eval()


def roberta_head(config: dict, state: State, source: Path, outputs: int) -> nn.Module:
    """The classifier of a RobertaForSequenceClassification: features (B, D) -> (B, outputs). Raises InputError."""
    head = RobertaClassificationHead(RobertaConfig.from_dict({**config, "num_labels": outputs}))
    load(head, state, source, prefix="classifier.")
    return nn.Sequential(nn.Unflatten(1, (1, -1)), head).eval().requires_grad_(False)  # it takes (B, N, D)


def t5(config: dict, state: State, source: Path) -> Answering:
    """A T5. Raises InputError, naming the entry, for weights that do not fit."""
    model = T5ForConditionalGeneration(T5Config.from_dict(config))
    # transformers ties it to the embeddings at first, whatever the config says. In Flan-T5 they differ.
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    load(model, state, source, unused=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias",))
    return Answering(model).eval()


def load(module: nn.Module, state: State, source: Path, prefix: str = "", unused: tuple[str, ...] = ()) -> None:
    """Load what is under a prefix, and fits exactly; a tied weight may be given under one of its names only.

    Raises InputError.
    """
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    state = {name: value for name, value in state.items() if not name.startswith(unused)}
    own = module.state_dict(keep_vars=True)
    given = {own[name]: value for name, value in state.items() if name in own}
    state |= {name: given[p] for name, p in own.items() if name not in state and p in given}
    refuse_unusable(state, {name: p.shape for name, p in own.items()}, source)
    module.load_state_dict(state)


def read_tokenizer(path: Path) -> Tokenizer:
    with refusing(f"{path} is not a readable tokenizer"):
        tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.token_to_id("<pad>") is None:
        raise InputError(f"{path} has no token <pad>, with which texts are padded")
    return tokenizer


def tokenise(tokenizer: Tokenizer, texts: list[str] | list[tuple[str, str]], longest: int) -> Tensor:
    """Texts, or pairs of them, as numbers of tokens (N, L), cut to `longest` and padded to one length."""
    tokenizer.enable_truncation(longest)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("<pad>"), pad_token="<pad>")
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])
