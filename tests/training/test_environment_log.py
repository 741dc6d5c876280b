"""What a resume says where something is otherwise than at the save."""

import copy
import json
import logging

from megatron_qwen.distributed.environment import environment_of_attempt
from megatron_qwen.training.environment_log import log_changes, record_environment


def test_a_resume_names_what_differs_and_what_that_means(pool, tmp_path):
    path = tmp_path / "logs" / "environment.json"
    (said,) = pool[1].run(_said, path)
    same, matters, harmless, unknown = said
    assert same == []
    assert matters == [
        "changed since ckpt: torch 1.0 -> NOW, numpy 0.1 -> NOW: values may differ in their last bits, so the run goes "
        "on, but not bit for bit as it would have"
    ]
    assert harmless == [
        "changed since ckpt: kernel 2.4 -> NOW: these compute no values, so no effect on them is expected"
    ]
    assert unknown == ["ckpt does not say what it was computed with, so this cannot be compared"]
    assert json.loads(path.read_text())["facts"]["ranks"] == "1"


def _said(path):
    record_environment(path)
    now = environment_of_attempt()
    matters, harmless = copy.deepcopy(now), copy.deepcopy(now)
    matters["facts"]["torch"], matters["packages"]["numpy"] = "1.0", "0.1"
    harmless["facts"]["kernel"] = "2.4"
    answers = []
    logger = logging.getLogger("megatron_qwen.training.environment_log")
    for before in (now, matters, harmless, None):
        lines = []
        handler = logging.Handler(logging.INFO)
        handler.emit = lambda record, lines=lines: lines.append(record.getMessage())
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            log_changes(before, of="ckpt")
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
        for value in (now["facts"]["torch"], now["packages"]["numpy"], now["facts"]["kernel"]):
            lines = [line.replace(f"-> {value}", "-> NOW") for line in lines]
        answers.append(lines)
    return answers
