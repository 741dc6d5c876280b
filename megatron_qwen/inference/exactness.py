"""Whether token-by-token decoding gives the bits of one forward pass here: asked of the machine and the model."""

from megatron_qwen.inference.blocks import BLOCK
from megatron_qwen.inference.engine import Engine
from megatron_qwen.inference.request import Request, Sampling

_NEW = 8  # tokens, half of them behind the end of a block


def largest_difference(engine: Engine) -> float:
    """Largest difference between log-probabilities of new tokens and of the same tokens in a whole text, in nats.

    A GEMM's rows may depend on how many rows there are: that is a matter of the library, the processor and the shape.
    The engine computes so that they do not where this is possible (``models/torch_backend/invariant_gemm.py``).

    Every rank of the layout must call it, with nothing else under way.

    Args:
        engine: with room for a block and a few tokens.
    """
    longest = engine.stage.longest
    new = max(1, min(_NEW, longest // 2))
    length = max(1, min(BLOCK - new // 2, longest - new))
    vocabulary = engine.stage.config.model.vocab_size
    prompt = tuple((7 * place + 3) % vocabulary for place in range(length))
    ((_, said),) = engine.answer([Request(prompt, Sampling(max_new_tokens=new))])
    whole = (*prompt, *said.tokens)
    ((_, scored),) = engine.answer([Request(whole, None, score_from=length)])
    pairs = zip(said.logprobs, scored.prompt_logprobs, strict=True)
    return max(abs(one - other) for one, other in pairs)
