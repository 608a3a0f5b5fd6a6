"""The configuration of an i3 in `transformers`: the fields of I3Config, under the same names."""
from dataclasses import dataclass, fields  # dataclass: for I3Config, whose text replaces the import below

from transformers import PretrainedConfig

from .i3 import I3Config


class I3HubConfig(PretrainedConfig):
    model_type = "i3"
    # what `transformers` calls the sizes that it asks for
    attribute_map = dict(hidden_size="d_model", num_hidden_layers="n_layer", num_attention_heads="n_head",
                         max_position_embeddings="context_length")

    def __init__(self, **kwargs):
        for field in fields(I3Config):
            setattr(self, field.name, kwargs.pop(field.name, field.default))
        super().__init__(**kwargs)

    def shape(self):
        """The values of I3Config's fields."""
        return {field.name: getattr(self, field.name) for field in fields(I3Config)}
