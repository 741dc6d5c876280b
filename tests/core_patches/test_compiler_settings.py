"""torch's compiler starts no processes, and compiles a formula for more than eight shapes."""

from megatron_qwen.core_patches import compiler_settings


def observe(prepared: bool) -> list[int]:
    """Compile threads, and kernels of a function."""
    import torch._dynamo.config
    import torch._inductor.config

    if prepared:
        compiler_settings.apply(kernels=64)
        compiler_settings.apply(kernels=8)
    return [torch._inductor.config.compile_threads, torch._dynamo.config.recompile_limit]


def test_settings(observed):
    assert observed.prepared == [1, 64]
    assert observed.plain[1] == 8
