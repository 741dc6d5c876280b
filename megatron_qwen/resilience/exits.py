"""How a rank ends: a UserError becomes one message and its exit code, any other exception a traceback."""

import os
import sys
import traceback
from collections.abc import Callable

from megatron_qwen.errors import EXIT_FAILURE, EXIT_LOST_PEER, UserError


def exit_code_of(program: Callable[[], int], *, report: Callable[[int, BaseException | None], None]) -> int:
    """Runs a rank's program and prints the error it raises.

    After an error the process exits through ``os._exit``: the normal clean-up would wait for the peers of a process
    group that is broken.

    Args:
        program: returns an exit code.
        report: called with the exit code and the exception, None if there was none.
    """
    raised: BaseException
    try:
        code = program()
        report(code, None)
        return code
    except UserError as error:
        raised = error
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
        # Ranks usually raise the same error; the rank's number tells which one raised another.
        print(error.render() if rank == "0" else f"rank {rank}: {error.render()}", file=sys.stderr, flush=True)
        code = error.exit_code
    except OSError as error:
        code, raised = EXIT_FAILURE, error
        if error.strerror is None:
            traceback.print_exc()
        else:
            where = f"{error.filename}: " if error.filename else ""
            print(f"error: {where}{error.strerror}. Committed checkpoints are not affected.", file=sys.stderr)
    except RuntimeError as error:
        raised = error
        traceback.print_exc()
        code = EXIT_LOST_PEER if _is_lost_peer(error) else EXIT_FAILURE
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # torch's CheckpointException derives from BaseException
        raised = error
        traceback.print_exc()
        code = EXIT_FAILURE
    report(code, raised)
    sys.stderr.flush()
    os._exit(code)


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    text = str(error)
    return any(
        sign in text
        for sign in (
            "Connection closed by peer",
            "Connection reset by peer",
            "NCCL error",
            "Broken pipe",
            "client socket has timed out",
        )
    )
