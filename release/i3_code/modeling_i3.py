"""i3 as a model of `transformers`: loss, logits and generate() around the I3 of i3.py."""
import torch
import torch.nn.functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_i3 import I3HubConfig
from .i3 import Config, I3


class ReadSoFar:
    """The tokens of a batch that were read while text is generated, and what the layers keep of them.

    A layer's state has no positions that could be masked. So the rows with equally many padding tokens on their left
    are read together, without these tokens, and each such group of rows has a cache of its own.
    """

    def __init__(self, model, ids, first):
        self.ids, self.first = ids[:, :0], first
        self.groups = [(begin, (first == begin).nonzero().flatten()) for begin in first.unique().tolist()]
        self.caches = [model.init_cache(len(rows)) for _, rows in self.groups]

    def goes_on_in(self, ids, first):
        """Whether ids (B, T) are the tokens that were read, and more."""
        n = self.ids.size(1)
        if len(ids) != len(self.ids) or n >= ids.size(1):
            return False
        return torch.equal(ids[:, :n], self.ids) and torch.equal(first, self.first)

    def read(self, model, ids):
        """Reads what is new in ids (B, T). Returns the logits behind the last token, (B, 1, V)."""
        logits = None
        for (begin, rows), cache in zip(self.groups, self.caches):
            of_group = model(ids[rows, max(begin, self.ids.size(1)):], cache=cache)[0]
            if logits is None:
                logits = of_group.new_empty(len(ids), *of_group.shape[1:])
            logits[rows] = of_group
        self.ids = ids
        return logits


class I3ForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = I3HubConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _is_stateful = True  # a state cannot go back by a token, as assisted generation would need

    def __init__(self, config):
        super().__init__(config)
        self.model = I3(Config(**config.shape()))
        self.read_so_far = None  # of the text that is being generated
        self.post_init()

    def _init_weights(self, module):
        pass  # I3 has given them their initial values

    def get_input_embeddings(self):
        return self.model.embed

    def set_input_embeddings(self, embed):
        self.model.embed = embed

    def get_output_embeddings(self):
        return self.model.head

    def set_output_embeddings(self, head):
        self.model.head = head

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # a cache of keys and values is of no use here

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, use_cache=True, **kwargs):
        """All tokens so far go to forward() each time, which reads only those that are new."""
        return dict(input_ids=input_ids, attention_mask=attention_mask, generating=use_cache is not False)

    def forward(self, input_ids, attention_mask=None, labels=None, logits_to_keep=0, generating=False, **kwargs):
        """input_ids int64 (B, T) -> logits (B, T, V) and, with labels (B, T; -100 is ignored), their mean loss.

        attention_mask (B, T) is 0 for padding tokens, on either side. logits_to_keep: positions at the end that logits
        are returned for; 0: all. generating: generate() asks, which wants the logits of the last position alone.
        """
        # a row's text begins at its first token that is no padding; state and position begin there
        first, reset = torch.zeros_like(input_ids[:, 0]), None
        if attention_mask is not None and not attention_mask.all():
            first = attention_mask.int().argmax(1)
            reset = torch.arange(input_ids.size(1), device=input_ids.device) == first[:, None]
        if generating:
            return CausalLMOutput(logits=self.next_logits(input_ids, first))

        logits = self.model(input_ids, reset=reset, all_logits=True)[0]
        loss = None
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return CausalLMOutput(loss=loss, logits=logits[:, -logits_to_keep:])  # -0 is the beginning

    @torch.no_grad()
    def next_logits(self, ids, first):
        """The logits behind the last token of ids (B, T), (B, 1, V). What was read before is not read again."""
        before, self.read_so_far = self.read_so_far, None
        if before is None or not before.goes_on_in(ids, first):  # a new text, or beams that changed places
            before = ReadSoFar(self.model, ids, first)
        logits = before.read(self.model, ids)
        self.read_so_far = before
        return logits
