"""How answers of a fine-tuned model are sampled where its files do not say: as Qwen2.5's instruct models."""

from typing import Any

# generation_config.json of Qwen2.5-7B-Instruct. transformers' default of 20 new tokens would cut off any answer.
SAMPLING: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "repetition_penalty": 1.05,
    "max_new_tokens": 512,
}
