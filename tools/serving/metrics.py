"""What the server does, as Prometheus reads it."""

from megatron_qwen.inference.service import Service
from megatron_qwen.job.prometheus import Number, page


def metrics_text(service: Service) -> str:
    """The page."""
    engine = service.engine
    return page(
        [
            Number("mq_serve_answers", "Answers that were finished.", service.answered, counts=True),
            Number("mq_serve_tokens", "Tokens that were chosen.", service.tokens, counts=True),
            Number("mq_serve_preempted", "Sequences put back for want of cache.", engine.preempted, counts=True),
            Number("mq_serve_pending", "Requests without an answer.", service.pending),
            Number("mq_serve_waiting", "Requests that have not begun.", engine.waiting),
            Number("mq_serve_running", "Requests that are being answered.", engine.running),
            Number("mq_serve_cache_free_ratio", "Part of the cache that nobody holds.", engine.free_share),
        ]
    )
