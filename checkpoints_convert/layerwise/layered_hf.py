"""A model under Hugging Face names run by transformers, one layer at a time."""

from collections.abc import Mapping
from typing import Any

import torch

from checkpoints_convert.layerwise.layered import FINAL_NORM, HEAD, Ends
from checkpoints_convert.tensor_set import TensorSet
from megatron_qwen.errors import ConversionError, Problem
from megatron_qwen.hf import library
from megatron_qwen.hf.config import ARCHITECTURES

_VOCABULARY = 8  # of the one-layer model, whose embedding is not used
# What of config.json decides what a layer computes. Nothing else reaches transformers: not where to get code from.
_COMPUTED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "attention_bias",
    "qkv_bias",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
)


class HfLayers:
    """A model of which each layer is loaded by transformers' own loader into a model of one layer.

    Args:
        weights: the model, of whatever kind its source is.
        config: its config.json.
        dtype: format to compute in.
        place: device to compute on.

    Raises:
        ConversionError: transformers is not installed.
    """

    def __init__(
        self, weights: TensorSet, config: Mapping[str, Any], *, dtype: torch.dtype, place: torch.device
    ) -> None:
        try:
            transformers = library.transformers()
        except ImportError:
            fix = "running a model layer by layer needs transformers: pip install 'megatron_qwen[hf]'."
            raise ConversionError(Problem("model", None, fix)) from None
        transformers.utils.logging.disable_progress_bar()
        self._weights, self._dtype, self._place = weights, dtype, place
        self._ends = Ends(weights, dtype=dtype, place=place)
        self.num_layers, self.vocab_size = int(config["num_hidden_layers"]), self._ends.vocab_size
        self.embed, self.output_rows = self._ends.embed, self._ends.output_rows
        kind = config["model_type"]
        content = {name: config[name] for name in _COMPUTED if name in config}
        content |= {"num_hidden_layers": 1, "vocab_size": _VOCABULARY, "tie_word_embeddings": False}
        self._config = transformers.AutoConfig.for_model(kind, **content, attn_implementation="sdpa")
        self._class: Any = getattr(transformers, ARCHITECTURES[kind])
        self._by_layer: dict[int, list[str]] = {}
        for name in weights.tensors:
            if name.startswith("model.layers."):
                self._by_layer.setdefault(int(name.split(".")[2]), []).append(name)
        self._layer: Any = None
        self._norm: Any = None

    def load_layer(self, index: int) -> None:
        """Brings a layer into memory, in place of the one before."""
        self._layer = None
        state = {
            f"model.layers.0.{name.split('.', 3)[3]}": self._weights.rows(name, 0, self._weights.tensors[name].shape[0])
            for name in self._by_layer[index]
        }
        norm = self._ends.norm_weight()
        state["model.embed_tokens.weight"] = state[HEAD] = norm.new_zeros(_VOCABULARY, norm.shape[0])
        state[FINAL_NORM] = norm
        model, report = self._class.from_pretrained(
            None, config=self._config, state_dict=state, dtype=self._dtype, output_loading_info=True
        )
        faults = {name: keys for name, keys in report.items() if keys}
        assert not faults, faults
        model = model.to(self._place).eval()
        self._norm, model.model.norm = model.model.norm, torch.nn.Identity()
        self._layer = model.model

    @property
    def loaded(self) -> torch.nn.Module:
        """The loaded layer as a module of transformers; its parameters are under ``model.layers.N.``."""
        assert self._layer is not None, "load_layer comes first"
        module: torch.nn.Module = self._layer.layers[0]
        return module

    @torch.no_grad()
    def layer(self, hidden: torch.Tensor) -> torch.Tensor:
        """[s, h] -> [s, h] by the loaded layer."""
        found: torch.Tensor = self._layer(inputs_embeds=hidden[None], use_cache=False).last_hidden_state[0]
        return found

    @torch.no_grad()
    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """[s, h] -> [s, h]."""
        found: torch.Tensor = self._norm(hidden)
        return found
