"""torch's compiler works in the process that asked, and makes as many kernels of a function as a run has shapes.

Replaces: two values of torch's configuration, ``torch._inductor.config.compile_threads`` (1) and
    ``torch._dynamo.config.recompile_limit`` (at least ``kernels``).
Needed: with every torch so far (2.15 too). With more than one compile thread the compiler starts processes of its own,
    which outlive a killed rank. Beyond the limit (8) it silently leaves a function uncompiled, and then rounds
    otherwise.
When: before the first kernel is compiled; models/torch_backend/compiled.py applies it.
Can go: the first when compile workers end with the process that started them (pytorch/pytorch pull request 189290 is
    about workers whose parent or sidecar is gone); the second when torch 2.11 need not be supported, since later
    versions take ``recompile_limit`` as an argument of torch.compile.
"""


def apply(*, kernels: int) -> None:
    """Sets both; a second call changes nothing.

    Args:
        kernels: most kernels of one function, one for each combination of shapes and formats.
    """
    import torch._dynamo.config
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, kernels)
